"""dictionary_learning: dictionaries of one site, as its `load_dictionary` reads them.

`ae.pt` is a pickled state dict, because the library reads no other form. When we read such a file,
we accept only tensors (`torch_file.py`). Decoder rows have length 1, and codes are in the units of
raw activations. The classes are

    topk                    AutoEncoderTopK      of x - b_dec, the k largest positive z of a row
    batchtopk, matryoshka   BatchTopKSAE         of x - b_dec, z above one threshold
    relu                    AutoEncoder          of x - b_dec, relu(z); b_enc includes W_enc b_dec
    jumprelu(_tanh)         JumpReluAutoEncoder  z above a threshold per latent
    gated                   GatedAutoEncoder     of x - b_dec, with two biases

Matryoshka is written as the BatchTopK that it is at inference. The library's Matryoshka class needs
the latents of a prefix to be consecutive, but here all latents keep their numbers.

SAEBench reads the same files. It chooses its class by `trainer_class`, the dictionary_learning
trainer that would have written them.

Imports torch only when it writes, so that `problem` is fast.
"""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, assert_never

from dist_sae.config import Run
from dist_sae.config.clt import CLTConfig
from dist_sae.config.crosscoder import CrosscoderConfig
from dist_sae.config.data import HuggingFaceModel, layer_of
from dist_sae.config.dictionary import KSelectionConfig
from dist_sae.config.matryoshka import MatryoshkaConfig
from dist_sae.config.sae import (
    BatchTopKConfig,
    CLTJumpReLUConfig,
    CrosscoderReLUConfig,
    GatedConfig,
    JumpReLUConfig,
    JumpReLUTanhConfig,
    ReLUConfig,
    RoutedConfig,
    TopKConfig,
)
from dist_sae.config.transcoder import TranscoderConfig

if TYPE_CHECKING:
    from dist_sae.checkpoint.layout import Checkpoint
    from dist_sae.checkpoint.piecewise import PiecewiseTensor

LIBRARY = "dictionary_learning"
_TRAINERS = {
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "AutoEncoder": "StandardTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
}
CONFIG = "config.json"


def problem(run: Run) -> str | None:
    """Return why dictionary_learning cannot represent a run's dictionary, or None if it can."""
    if _class(run) is None:
        return f"sae.kind: {run.sae.kind}: dictionary_learning does not support this kind"
    return None


def _class(run: Run) -> str | None:
    match run.sae:
        case (
            TranscoderConfig()
            | RoutedConfig()
            | CLTConfig()
            | CLTJumpReLUConfig()
            | CrosscoderConfig()
            | CrosscoderReLUConfig()
        ):
            return None
        case TopKConfig():
            return "AutoEncoderTopK"
        case BatchTopKConfig() | MatryoshkaConfig():
            return "BatchTopKSAE"
        case ReLUConfig():
            return "AutoEncoder"
        case JumpReLUConfig() | JumpReLUTanhConfig():
            return "JumpReluAutoEncoder"
        case GatedConfig():
            return "GatedAutoEncoder"
        case _:
            assert_never(run.sae)


def config(run: Run, checkpoint: "Checkpoint") -> str:
    """Return `config.json`: the keys of `trainer` that the library and its users read."""
    from dist_sae.checkpoint.trained import normalisers_of
    from dist_sae.interop.raw import model_name, origin

    of_model, name = isinstance(run.model, HuggingFaceModel), str(_class(run))
    trainer = {
        "trainer_class": _TRAINERS[name],
        "dict_class": name,
        "activation_dim": normalisers_of(run, checkpoint).widths.d_in,
        "dict_size": run.sae.n_latents,
        **({"k": run.sae.k} if isinstance(run.sae, KSelectionConfig) else {}),
        "lm_name": model_name(run),
        "layer": layer_of(run.site.partition("@")[0]) if of_model else None,
        "submodule_name": run.site,
    }
    content = {"trainer": trainer, "dist_sae": origin(run, checkpoint)}
    return json.dumps(content, indent=2)


def files(run: Run, checkpoint: "Checkpoint") -> dict[str, Callable[[], Iterator[bytes]]]:
    """Return the function that yields the state dict, for raw activations in fp32."""
    from dist_sae.interop.torch_file import torch_file_pieces

    return {"ae.pt": lambda: torch_file_pieces(_tensors(run, checkpoint))}


def note(run: Run, checkpoint: "Checkpoint") -> str:  # noqa: ARG001 - all formats have it
    """Return the note that the file is a pickle."""
    return "ae.pt is a pickle, the only format that dictionary_learning reads"


def _tensors(run: Run, checkpoint: "Checkpoint") -> "Iterator[PiecewiseTensor]":
    import torch

    from dist_sae.interop.raw import RawDictionary, in_memory_tensor

    name = _class(run)
    raw = RawDictionary(run, checkpoint, unit_rows=True, one_threshold=name == "BatchTopKSAE")
    b_enc, b_dec = raw.per_latent["b_enc"], raw.shared["b_dec"]
    if name == "JumpReluAutoEncoder":
        yield raw.encoder("W_enc", transpose=True)
        yield raw.decoder("W_dec")
        yield in_memory_tensor("b_enc", b_enc)
        yield in_memory_tensor("b_dec", b_dec)
        yield in_memory_tensor("threshold", raw.per_latent["threshold"])
        return
    yield raw.encoder("encoder.weight")
    yield raw.decoder("decoder.weight", transpose=True)
    match name:
        case "AutoEncoder":
            yield in_memory_tensor("encoder.bias", b_enc + raw.encoded_b_dec())
            yield in_memory_tensor("bias", b_dec)
        case "GatedAutoEncoder":
            shift, r_mag = raw.encoded_b_dec(), raw.per_latent["r_mag"]
            yield in_memory_tensor("decoder_bias", b_dec)
            yield in_memory_tensor("r_mag", r_mag)
            yield in_memory_tensor("gate_bias", b_enc + shift)
            yield in_memory_tensor("mag_bias", raw.per_latent["b_mag"] + r_mag.exp() * shift)
        case _:
            assert isinstance(run.sae, KSelectionConfig)
            above = raw.per_latent.get("threshold", torch.tensor([-1.0]))  # -1: no threshold
            yield in_memory_tensor("encoder.bias", b_enc)
            yield in_memory_tensor("b_dec", b_dec)
            yield in_memory_tensor("k", torch.tensor(run.sae.k, dtype=torch.int32))
            yield in_memory_tensor("threshold", above[0])
