"""Translation of pydantic's errors into one line per problem, in the user's terms."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic_core import ErrorDetails

from dist_sae.config.base import Section

_ELSEWHERE = {
    "activations.context_tokens": "context_size context_length ctx_len seq_len max_seq_len",
    "activations.sites": "hook_name hook_point hookpoint hookpoints hook_layer layer "
    "submodule_name",
    "corpus.name": "dataset dataset_name dataset_path",
    "corpus.text_field": "text_column text_key column",
    "model.path": "model_name model_id model_name_or_path pretrained",
    "processes.trainers": "devices n_devices num_gpus n_gpus world_size nproc_per_node",
    "sae.auxk_coefficient": "auxk_alpha aux_loss_coefficient auxk_coef aux_alpha",
    "sae.dead_after_rows": "dead_feature_window dead_feature_threshold dead_steps",
    "sae.k": "top_k topk activation_fn_k",
    "sae.kind": "architecture sae_type trainer_type activation activation_fn",
    "sae.multi_factor": "multi_topk",
    "sae.n_latents": "d_sae dict_size dictionary_size num_latents n_features num_features d_hidden "
    "n_dict_components width expansion_factor",
    "sae.prefixes": "matryoshka_widths group_sizes group_fractions",
    "sae.sparsity": "l1_coefficient l1_coeff l1_penalty l1_weight l0_coefficient sparsity_penalty "
    "sparsity_coefficient lambda",
    "store.activations": "cache_dir activation_path activations_path cached_activations_path",
    "store.runs": "output output_dir save_dir checkpoint_path run_dir",
    "telemetry.wandb": "wandb_project log_to_wandb use_wandb",
    "train.batch_rows": "batch_size train_batch_size train_batch_size_tokens sae_batch_size",
    "sae.target_l0": "l0_target wanted_l0 desired_l0",
    "train.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "train.clip_norm": "max_grad_norm grad_clip gradient_clipping gradient_clip_val",
    "train.decay_share": "lr_decay_steps decay_start",
    "train.ema_decay": "ema ema_multiplier",
    "train.lr": "learning_rate",
    "train.rows": "training_tokens total_training_tokens num_tokens n_tokens total_tokens steps "
    "num_steps max_steps total_training_steps",
    "train.save_every_steps": "save_every checkpoint_every save_steps n_checkpoints",
    "train.warmup_steps": "lr_warm_up_steps lr_warmup_steps warmup",
}
OTHER_NAMES = {name: key for key, names in _ELSEWHERE.items() for name in names.split()}
"""Mapping from names in SAELens, dictionary_learning, eai-sparsify and others to our keys."""
_UNITS = {
    "expansion_factor": "that factor times the model's width",
    **dict.fromkeys(("steps", "num_steps", "max_steps", "total_training_steps"), "steps x batch"),
}


def explain(errors: Sequence[ErrorDetails], root: type[Section]) -> Iterator[str]:
    """Yield one line per problem.

    Args:
        root: The section that was validated.
    """
    for error in _innermost(errors):
        yield from _explain(error, root)


def _innermost(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Drop errors that follow from others, such as "too short" for a list with bad items."""
    inner = {error["loc"][:depth] for error in errors for depth in range(len(error["loc"]))}
    numbers = {error["loc"][:-1] for error in errors if error["type"].startswith("int_")}
    return [
        error
        for error in errors
        if error["loc"] not in inner
        and error["type"] != "default_factory_not_called"  # it needs another key, which is wrong
        # for a key that takes a number or a word, one error is enough
        and not (error["type"] == "literal_error" and error["loc"][:-1] in numbers)
    ]


def _explain(error: ErrorDetails, root: type[Section]) -> Iterator[str]:
    path, known = _locate(error["loc"], root)
    dotted = ".".join(path)
    message = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden":
            yield f"{dotted}: unknown key; {_hint(path, known, root)}"
        case "missing":
            yield f"{dotted}: missing"
        case "union_tag_not_found":
            yield f"{dotted}.kind: missing; give one of {', '.join(known)}"
        case "union_tag_invalid":
            kind = error["ctx"]["tag"]
            close = difflib.get_close_matches(kind, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"give one of {', '.join(known)}"
            yield f"{dotted}.kind: unknown kind {kind}; {hint}"
        case "model_type" | "model_attributes_type":
            yield f"{dotted}: must be a section with its own keys (got {error['input']!r})"
        case "value_error" if not path:  # from the check across sections, whose lines contain paths
            yield from message.splitlines()
        case "value_error":
            yield f"{dotted}: {message}"
        case _:
            message = message[0].lower() + message[1:]
            yield f"{dotted}: {message.replace('tuple', 'list')} (got {error['input']!r})"


def _hint(path: Sequence[str], known: Sequence[str], root: type[Section]) -> str:
    """Guess the intended key by spelling, by other tools' names, or by its section."""
    *above, key = path
    section, places = ".".join(above), sections_by_key(root)
    if key in OTHER_NAMES:
        place, _, meant = OTHER_NAMES[key].rpartition(".")
        unit = f" ({_UNITS[key]})" if key in _UNITS else ""
        hint = f"did you mean {meant if place == section else OTHER_NAMES[key]}{unit}?"
        elsewhere = place == section and meant not in known
        return hint + f" it is a key of kind {', '.join(places[meant][place])}" * elsewhere
    if close := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {close[0]}?"
    if kinds := places.get(key, {}).get(section):
        return f"it is a key of kind {', '.join(kinds)}"
    if key in places:
        return f"did you mean {' or '.join(f'{place}.{key}' for place in places[key])}?"
    return f"known keys: {', '.join(known)}"


def dotted_keys(root: type[Section]) -> Iterator[str]:
    """Yield the dotted keys of a section and its subsections, of every kind, for `--set`."""
    for name, field in root.model_fields.items():
        sections = sections_by_kind(field.annotation)
        for section in sections.values():
            yield from (f"{name}.{key}" for key in dotted_keys(section))
        if not sections:
            yield name


def sections_by_key(root: type[Section], prefix: str = "") -> dict[str, dict[str, list[str]]]:
    """Map each key to the sections that have it, with their kinds. Leaves out `cluster`."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, field in root.model_fields.items():
        if name == "cluster":
            continue
        for kind, section in sections_by_kind(field.annotation).items():
            place = f"{prefix}{name}"
            for key in section.model_fields:
                kinds = found.setdefault(key, {}).setdefault(place, [])
                kinds += [kind] if kind else []
            for key, places in sections_by_key(section, f"{place}.").items():
                found[key] = places | found.get(key, {})
    return found


def _locate(loc: tuple[int | str, ...], root: type[Section]) -> tuple[list[str], list[str]]:
    """Find the path of an error as the user wrote it, and the keys or kinds that are valid there.

    pydantic adds the tag of a union to the path (`sae.topk.k`), which the user did not write.

    Returns:
        The path, and the keys of its section. If the path is of a union, the union's kinds.
    """
    path: list[str] = []
    known: list[str] = []
    sections: Mapping[Any, type[Section]] = {None: root}  # sections that may be here, by kind
    plain_union = False
    for key in loc:
        if key == "[key]":  # pydantic's marker; the key itself came before
            continue
        if plain_union:  # pydantic's names of the union's members
            continue
        if key in sections:
            sections = {None: sections[key]}
            continue
        fields = sections[None].model_fields if None in sections else {}
        path.append(str(key))
        known = list(fields)
        annotation = fields[str(key)].annotation if key in fields else None
        sections = sections_by_kind(annotation)
        plain_union = not sections and get_origin(annotation) in (Union, UnionType)
    is_union = bool(sections) and None not in sections
    return path, list(sections) if is_union else known


def sections_by_kind(annotation: Any) -> dict[Any, type[Section]]:
    """Map kinds to the sections that a field may have. A section outside a union is under None."""
    sections = list(_sections_in(annotation))
    if sections and "kind" not in sections[0].model_fields:
        return {None: sections[0]}
    return {section.model_fields["kind"].default: section for section in sections}


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)
