"""Texts of latents, as readers see them."""

from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import transformers

from dist_sae.config.data import HuggingFaceModel
from dist_sae.errors import CorpusError
from dist_sae.index.texts import Place, Token, build_example
from dist_sae.models.loading import load_tokenizer

TEXT = "a\u00e9\u201c\U0001f600b"  # characters of 1, 2, 3, 4 and 1 bytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer with one token per byte, as byte-level tokenizers have for rare characters."""
    folder = tmp_path_factory.mktemp("bytes")
    bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({byte: i for i, byte in enumerate(bytes_)}, [])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    hf: Any = transformers
    hf.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    return load_tokenizer(HuggingFaceModel(path=str(folder)))


def test_parts_of_a_character_are_seen_together(tokenizer: Any) -> None:
    (ids,) = tokenizer([TEXT])
    assert tokenizer.text(ids) == [
        *("a", "\u00e9", "", "\u201c", "", "", "\U0001f600", "", "", "", "b")
    ]
    assert tokenizer.text(ids[1:2]) == ["\ufffd"]  # a part of a character has no text


def test_a_character_has_one_highlight(tokenizer: Any) -> None:
    """The highlight has the activation of the character's most active token, wherever the window
    begins.
    """
    text = 8 * "xyz" + TEXT
    (ids,) = tokenizer([text])
    # the second byte of the last character, which has four
    peak = ids.index(tokenizer([TEXT])[0][7])
    texts: Any = SimpleNamespace(tokens=lambda _: ids, tokenizer=tokenizer, context_tokens=1000)
    known = {(0, peak): 2.0, (0, peak + 1): 1.0}
    example = build_example(Place(0, peak, ids[peak]), known, texts)
    assert example.tokens[example.peak] == Token("\U0001f600", 2.0, in_context=True)
    assert [token.text for token in example.tokens if token.act] == ["\U0001f600"]
    assert text.endswith("".join(token.text for token in example.tokens))


def test_an_example_is_refused_when_the_text_is_another() -> None:
    texts: Any = SimpleNamespace(tokens=lambda _: [5, 6, 7], tokenizer=None, context_tokens=8)
    for place in (Place(0, 1, 7), Place(0, 3, 7)):
        with pytest.raises(CorpusError, match="is not the text that the activations"):
            build_example(place, {(0, place.position): 1.0}, texts)
