"""Messages about keys: the type of a value in words, what a wrong value should have been, and the nearest known key."""

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .registry import owners
from .schema import Key

# words of timm, mmsegmentation, ultralytics and Hugging Face for our keys
SYNONYMS = {
    "optim.lr": "learning_rate lr0 base_lr",
    "optim.name": "opt optimizer",
    "optim.weight_decay": "wd",
    "optim.clip": "clip_grad grad_clip max_grad_norm clip_norm",
    "optim.layer_decay": "layerwise_decay llrd layer_wise_lr_decay",
    "optim.kwargs": "momentum betas eps opt_kwargs nesterov",
    "sched.name": "scheduler lr_scheduler lr_scheduler_type lr_policy",
    "sched.epochs": "max_epochs num_epochs num_train_epochs",
    "sched.steps": "max_iters max_steps iterations num_steps iters total_steps",
    "sched.warmup": "warmup_epochs warmup_steps warmup_iters warmup_ratio",
    "sched.warmup_lr": "warmup_bias_lr warmup_start_lr",
    "sched.min_lr": "lrf eta_min",
    "sched.cooldown": "cooldown_epochs",
    "sched.patience": "early_stopping early_stopping_patience early_stop",
    "sched.freeze": "freeze_epochs freeze_steps unfreeze unfreeze_epoch",
    "model.freeze": "frozen_stages freeze_backbone freeze_stages",
    "model.drop_path_rate": "drop_path stochastic_depth",
    "model.init_from": "initial_checkpoint checkpoint weights finetune init_cfg",
    "model.pretrained": "use_pretrained pretrained_weights",
    "model.kwargs": "model_kwargs num_heads",
    "model.name": "arch architecture backbone",
    "data.batch": "batch_size per_device_train_batch_size samples_per_gpu train_batch_size",
    "data.micro_batch": "grad_accum_steps gradient_accumulation_steps accumulate batch_size_per_gpu",
    "data.eval_batch": "val_batch_size validation_batch_size per_device_eval_batch_size eval_batch_size",
    "data.size": "imgsz img_size image_size input_size crop_size resolution",
    "data.workers": "num_workers dataloader_num_workers workers_per_gpu",
    "data.root": "data_dir data_root data_path dataset_path path dir",
    "data.source": "dataset dataset_type data_type",
    "data.aug.hflip": "fliplr horizontal_flip",
    "data.aug.vflip": "flipud vertical_flip",
    "data.aug.erasing": "reprob random_erasing",
    "data.aug.auto_augment": "aa autoaugment randaugment",
    "task.smoothing": "label_smoothing",
    "task.num_classes": "nc classes n_classes",
    "ema.decay": "model_ema model_ema_decay ema_decay momentum_ema",
    "parallel.precision": "amp fp16 bf16 mixed_precision half dtype",
    "parallel.compile": "torchcompile torch_compile",
    "run.seed": "random_seed",
    "run.out": "output output_dir work_dir project save_dir",
    "run.name": "experiment exp_name run_name",
    "ckpt.resume": "resume_from resume_from_checkpoint",
    "ckpt.every": "save_steps save_period checkpoint_interval checkpoint_hist",
    "ckpt.keep_last": "save_total_limit max_keep_ckpts",
    "eval.every": "eval_steps val_interval eval_interval val_period evaluation_interval",
    "log.every": "log_interval logging_steps print_freq",
}
MEANT = {word: key for key, words in SYNONYMS.items() for word in words.split()}


def unknown_key(key: str, known: Mapping[str, Key]) -> str:
    """A sentence about a key that a recipe does not take, with the key that was probably meant."""
    if any(name.startswith(f"{key}.") for name in known):
        return f"unknown key {key}: it is a section; give one of its keys"
    if found := owners(key):
        return f"{key} has no effect here: it is a key of {' and of '.join(found)}; remove it"
    near = nearest_key(key, known)
    hint = f"did you mean {near}?" if near else "tessel train --help lists the keys"
    return f"unknown key {key}; {hint}"


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The known key of the same last name, else of the same meaning, of these initials, or of similar spelling."""
    last = {name: name.rpartition(".")[2] for name in known}
    ending = key.rpartition(".")[2].replace("-", "_").lower()
    near = [name for name in last if last[name] == ending]
    near = near or [name for name in last if name == MEANT.get(ending)]
    # a key may be the initials of the name, as lr of learning_rate
    near = near or [name for name in last if last[name] == "".join(word[:1] for word in ending.split("_"))]
    near = near or difflib.get_close_matches(key, last, n=1, cutoff=0.5)
    return near[0] if near else None


def wrong_values(errors: Iterable[Any], known: Mapping[str, Key]) -> Iterator[str]:
    """One sentence for each key of which pydantic has `errors`."""
    told = set()
    for error in errors:
        parts = [str(part) for part in error["loc"]]
        # pydantic adds the type below a key with a choice of types, the position below a list, the key below a mapping
        names = [".".join(parts[: length + 1]) for length in range(len(parts))]
        key = next((name for name in names if name in known), names[-1] if names else "")
        if key in known and typing.get_origin(known[key].hint) is dict:
            key = names[-1]
        if key in told:
            continue
        told.add(key)
        yield _wrong_value(key, error, [one for one in errors if _belongs(one, key)], known)


def _belongs(error: Any, key: str) -> bool:
    return f"{'.'.join(str(part) for part in error['loc'])}.".startswith(f"{key}.")


def _wrong_value(key: str, error: Any, same: list[Any], known: Mapping[str, Key]) -> str:
    nested = len(error["loc"]) > len(key.split("."))
    if error["type"] == "unexpected_keyword_argument":
        return unknown_key(key, known)
    if error["type"].startswith("missing") and not nested:
        description = known[key].description if key in known else ""
        return f"{key} is missing" + (f": {description}" if description else "")
    if error["type"] == "dataclass_type":
        return f"{key} is a section: it takes key: value lines, not {error['input']!r}"
    if key in known and (wanted := describe_list(known[key].hint)):
        found = "" if nested else f"={error['input']!r}"
        meaning = f" ({known[key].description})" if known[key].description else ""
        return f"{key}{found} must be {wanted[0]}, for example {key}={wanted[1]}{meaning}"
    message = next((one["msg"] for one in same if one["type"] != "literal_error"), error["msg"])
    words = [one["ctx"]["expected"].replace("'", "") for one in same if nested and one["type"] == "literal_error"]
    also = f", or {words[0]}" if words and message != error["msg"] or len(same) > 1 and words else ""
    return f"{key}={error['input']!r}: {message[0].lower()}{message[1:]}{also}"


def describe_type(hint: Any) -> str:
    """A type as a user writes it in a recipe."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join("null" if part is type(None) else describe_type(part) for part in arguments)
    names = {"tuple": "list", "dict": "mapping", "str": "text", "bool": "true | false", "int": "integer"}
    return names.get(hint.__name__, str(hint.__name__))


LISTS: dict[Any, tuple[str, str, str]] = {  # type of the items: its name in the plural, and two examples
    float: ("numbers", "0.5", "1.0"),
    int: ("integers", "1", "2"),
    bool: ("true or false", "true", "false"),
    str: ("texts", "a", "b"),
}


def describe_list(hint: Any) -> tuple[str, str] | None:
    """What a key that takes a list wants, in words and by an example; None for other keys."""
    for part in (hint, *typing.get_args(hint)):
        items = typing.get_args(part)
        if typing.get_origin(part) is not tuple or not items:
            continue
        inner = typing.get_args(items[0])
        kind = next((one for one in (items[0], *inner) if one in LISTS), str)
        plural, first, second = LISTS[kind]
        if items[-1] is Ellipsis:
            return f"a list of {plural}", f"[{first}, {second}]"
        counts = {2: "two", 3: "three", 4: "four"}
        example = ", ".join([first, second, second, second][: len(items)])
        return f"a list of {counts.get(len(items), len(items))} {plural}", f"[{example}]"
    return None
