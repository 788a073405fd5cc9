"""Text classifiers of `transformers`, from a folder or the hub."""

from collections.abc import Sequence

import torch
import transformers

from dist_sae.config.data import HuggingFaceModel
from dist_sae.errors import ModelError
from dist_sae.models.loading import errors_of, load_plain_tokenizer
from dist_sae.storage.model_files import name_or_path

_BATCH = 32


class Classifier:
    """A classifier that computes the probability of a label for texts. Runs on the CPU, in fp32.

    Args:
        path: Folder, or name on the hub, of a model with a head for sequence classification.
        label: Name of the label. None takes the only label, or the second of two.

    Raises:
        ModelError: The model cannot be loaded, or does not have the label.
    """

    def __init__(self, path: str, label: str | None) -> None:
        config = HuggingFaceModel(path=path, dtype="fp32")
        with errors_of(config):
            place = name_or_path(config, weights=True)
            self._tokenizer = load_plain_tokenizer(config)
            model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
                place, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        if missing := sorted(found["missing_keys"]):
            raise ModelError(
                f"{path}: is not a trained classifier: {missing[0]} is missing; use a model with a "
                f"head for sequence classification"
            )
        self._model = model.eval()
        names = {str(name): int(n) for n, name in model.config.id2label.items()}
        self._is_multi_label = model.config.problem_type == "multi_label_classification"
        if label is None and len(names) <= 2:  # noqa: PLR2004 - no and yes
            self._label = len(names) - 1
        elif label in names:
            self._label = names[label]
        else:
            problem = f"has no label {label}" if label else "name one of its labels as FOLDER#LABEL"
            raise ModelError(f"{path}: {problem}; it has {', '.join(names)}")

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str]) -> list[float]:
        """Return the label's probability for each text. Texts beyond the model's limit are cut."""
        found = []
        for start in range(0, len(texts), _BATCH):
            batch = self._tokenizer(
                list(texts[start : start + _BATCH]),
                truncation=True,
                max_length=self._max_tokens,
                padding=True,
                return_tensors="pt",
            )
            logits = self._model(**batch).logits.double()
            one_each = self._is_multi_label or logits.shape[1] == 1
            shares = logits.sigmoid() if one_each else logits.softmax(1)
            found += shares[:, self._label].tolist()
        return found

    @property
    def _max_tokens(self) -> int | None:
        limits = [self._tokenizer.model_max_length]
        limits += [getattr(self._model.config, "max_position_embeddings", None) or limits[0]]
        least = min(limits)
        return int(least) if least < 1 << 30 else None  # 1e30 in tokenizers without a limit
