"""A recipe: all that decides how a training run goes. One dataclass = a TOML file = the flags of `minires train`."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .recipe_values import toml, typed

SHIPPED = Path(__file__).parent / "recipes"


def _field(default: Any, says: str, valid: Callable[[Any], bool] | None = None, must: str = "") -> Any:
    """A field, its line of help, and what its values must be."""
    return dataclasses.field(default=default, metadata={"help": says, "valid": valid, "must": must})


def _free(default: Any, says: str, *rule: Any) -> Any:
    """A field that changes nothing in the result, so that a resumed run may have another value."""
    field = _field(default, says, *rule)
    field.metadata = {**field.metadata, "free": True}
    return field


def _at_least(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v >= least, f"be at least {least}"


_POSITIVE = (lambda v: v > 0, "be above 0")
_NOT_NEGATIVE = (lambda v: v >= 0, "not be negative")
_FRACTION = (lambda v: 0 <= v < 1, "be from 0 to below 1")


def _from_weights(*args: Any) -> Any:
    """A field of runs that begin with pretrained weights."""
    field = _field(*args)
    field.metadata = {**field.metadata, "group": "Fine-tuning"}
    return field


@dataclass(frozen=True)
class Recipe:
    """How to train. Raises ValueError or TypeError naming the field for a value that cannot be.

    The schedule sets the learning rate of every step. Over the share `warmup` of the run it climbs to `lr`, then:
    "one_cycle" (which climbs along a cosine too) falls along a cosine to almost 0 (Smith & Topin 2017), "cosine" falls
    along a cosine to 0, "multistep" is divided by 10 after each of `milestones` (He et al. 2015, section 4.2).

    With `weights` the run begins with them (`minires.train.finetune`). A stage is "stem", "layer1", ..., or "head".
    """

    model: str = _field("resnet20", "name of the model; 'minires info' lists them")
    stem: Literal["", "cifar", "imagenet"] = _field(
        "", "first layers: 'cifar' keeps the image's size; '': as the model has it"
    )
    dataset: str = _field(
        "digits",
        "'digits', 'cifar10', 'cifar100', 'mnist', 'fashion_mnist', 'folder' (of images, in data_dir), or a path: a "
        "folder or archive of train/CLASS/*.png and test/CLASS/*.png",
    )
    data_dir: str = _free("", "where the data set lies")
    download: bool = _free(False, "fetch the data set if it is not there")
    image_size: int = _field(16, "height and width that images are resized to, in pixels", *_at_least(1))
    val: int = _field(
        0, "training images held out: epochs are judged on them, the test images seen once, at the end", *_NOT_NEGATIVE
    )
    normalize: Literal["channel", "pixel_mean"] = _field(
        "channel", "'channel': (x - mean) / deviation per channel; 'pixel_mean': x - mean image"
    )
    mean: tuple[float, ...] = _field(
        (), "the mean per channel, in [0, 1], to normalise by; none: that of the training images"
    )
    std: tuple[float, ...] = _field((), "the deviation that goes with mean")
    shift: int = _field(0, "pad training images by so many pixels, crop them back at random", *_NOT_NEGATIVE)
    flip: bool = _field(False, "mirror half of the training images left to right")
    cutout: int = _field(0, "blank a square of so many pixels in every training image", *_NOT_NEGATIVE)
    mixup: float = _field(
        0.0, "mix pairs of training images by shares from Beta(mixup, mixup); 0: do not", *_NOT_NEGATIVE
    )
    epochs: int = _field(20, "passes over the training images", *_at_least(1))
    steps: int = _field(0, "stop after so many steps, whatever `epochs` says; 0: epochs decide", *_NOT_NEGATIVE)
    batch_size: int = _field(64, "images per step", *_at_least(1))
    accumulate: int = _field(1, "compute a step in so many parts, whose gradients are summed", *_at_least(1))
    optimizer: Literal["sgd", "adamw", "lars"] = _field("sgd", "how gradients change the weights")
    lr: float = _field(0.1, "highest learning rate", *_POSITIVE)
    momentum: float = _field(0.9, "momentum of SGD and LARS", *_FRACTION)
    nesterov: bool = _field(True, "Nesterov's form of momentum (SGD)")
    weight_decay: float = _field(5e-4, "L2 penalty (AdamW: decoupled decay)", *_NOT_NEGATIVE)
    l1: float = _field(0.0, "L1 penalty", *_NOT_NEGATIVE)
    decay_norm: bool = _field(True, "weight decay on batch normalisation and biases too")
    clip: float = _field(0.0, "largest norm of the gradient, longer ones are scaled down; 0: any", *_NOT_NEGATIVE)
    schedule: Literal["one_cycle", "cosine", "multistep"] = _field("one_cycle", "how the learning rate moves")
    warmup: float = _field(0.0, "share of the run in which the learning rate climbs to its highest", *_FRACTION)
    milestones: tuple[float, ...] = _field((0.5, 0.75), "multistep: shares of the run after which lr is divided by 10")
    label_smoothing: float = _field(0.0, "share of each target spread over all classes", *_FRACTION)
    ema: float = _field(0.0, "decay of the running average of the weights that is judged and kept; 0: none", *_FRACTION)
    final: Literal["last", "best"] = _field(
        "last", "weights that the run ends with: the last, or those of the epoch that was best on held-out images (val)"
    )
    patience: int = _field(
        0, "stop after so many epochs without a better one on held-out images (val); 0: never", *_NOT_NEGATIVE
    )
    weights: str = _from_weights("", "begin with these weights: a file, a run folder, or the name of published ones")
    head: Literal["auto", "keep", "new"] = _from_weights(
        "auto",
        "the last layer: 'keep' that of the weights, draw a 'new' one; 'auto': keep it if the classes are as many",
    )
    probe: bool = _from_weights(False, "compute the features once, and train a linear head on them alone")
    freeze_until: str = _from_weights("", "stages before this one are not trained; 'head': the head alone is")
    unfreeze_every: int = _from_weights(
        0, "begin with the head alone, add the stage below after every so many epochs; 0: all at once", *_NOT_NEGATIVE
    )
    head_lr: float = _from_weights(1.0, "learning rate of the head, as a multiple of lr (10x)", *_POSITIVE)
    layer_decay: float = _from_weights(
        1.0,
        "learning rate of every stage, as a share of that of the stage above it",
        lambda v: 0 < v <= 1,
        "be above 0 and at most 1",
    )
    bn: Literal["auto", "train", "eval", "frozen"] = _from_weights(
        "auto",
        "batch normalisation: 'train' by the batch's statistics, 'eval' by the running ones; 'frozen': 'eval', and its "
        "weights are not trained; 'auto': 'eval' in stages while they are not trained, 'train' in the others",
    )
    l2_sp: float = _from_weights(
        0.0, "L2 penalty on the distance to the weights begun with; weight_decay is then the new head's", *_NOT_NEGATIVE
    )
    recalibrate: bool = _field(False, "at the end, measure batch normalisation's statistics anew with the last weights")
    seed: int = _field(0, "seed of initial weights, order and augmentation", *_NOT_NEGATIVE)
    device: str = _field("cpu", "'cpu', 'cuda' or 'cuda:N'")
    precision: Literal["fp32", "bf16", "fp16"] = _field(
        "fp32", "'bf16', 'fp16': mixed precision, products in 16 bits, weights in float32 (fp16 is for GPUs)"
    )
    threads: int = _free(0, "CPU threads of the kernels; 0: all", *_NOT_NEGATIVE)
    cuda_graphs: bool = _free(
        False, "capture the training step in a CUDA graph and replay it: the same results, with less work for the host"
    )
    autotune: bool = _field(False, "measure all kernels at every new shape, use the fastest")
    checkpoint_blocks: bool = _field(False, "less memory: compute blocks again in backward")
    workers: int = _free(0, "how many prepare images ahead of time", *_NOT_NEGATIVE)
    worker_kind: Literal["thread", "process"] = _free("thread", "what the workers are")
    eval_every: int = _field(1, "judge after every so many epochs, and the last", *_at_least(1))
    checkpoint_every: int = _free(0, "save after every so many steps too, not only every epoch", *_NOT_NEGATIVE)
    keep: int = _free(2, "checkpoints that stay: the last so many, and the best", *_at_least(1))
    tensorboard: bool = _free(False, "write TensorBoard files too")
    out: str = _free("", "run folder, new or empty; by default runs/NAME-DATE-TIME")
    name: str = _field("custom", "name of the recipe")
    expected: str = _field("", "what it was measured to reach, with n and spread, and the command")

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(Recipe)
        for field in dataclasses.fields(self):
            value = typed(field.name, getattr(self, field.name), kinds[field.name])
            object.__setattr__(self, field.name, value)  # ints given for floats, lists given for tuples
            valid = field.metadata["valid"]
            if valid is not None and not valid(value):
                raise ValueError(f"{field.name}={value!r} must {field.metadata['must']}")
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs momentum above 0; set nesterov to false")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones={self.milestones} must be rising fractions between 0 and 1")
        if len(self.mean) != len(self.std) or not all(v > 0 for v in self.std):
            raise ValueError(f"mean={self.mean} and std={self.std} must be as long, and std above 0")
        if self.mean and self.normalize == "pixel_mean":
            raise ValueError("mean and std do not go with normalize='pixel_mean'")
        for name, needed in (("patience", self.patience), ("final", self.final == "best")):
            if needed and not self.val:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs val, images held out of training: the test images must not "
                    "choose the epoch"
                )
        for name in ("probe", "freeze_until", "unfreeze_every", "l2_sp"):
            if getattr(self, name) and not self.weights:
                raise ValueError(f"{name}={getattr(self, name)!r} needs weights to begin with")
        if self.bn != "auto" and not self.weights:
            raise ValueError(f"bn={self.bn!r} needs weights to begin with")
        if self.cuda_graphs and not self.device.startswith("cuda"):
            raise ValueError(f"cuda_graphs=True needs a GPU: device='cuda', not {self.device!r}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} must divide batch_size={self.batch_size}")

    def to_toml(self) -> str:
        """The recipe as a TOML file that `load_recipe` reads back; without `out`: another run, another folder."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("out", "expected")}
        return "".join(f"{name} = {toml(value)}\n" for name, value in fields.items())


FREE = frozenset(field.name for field in dataclasses.fields(Recipe) if "free" in field.metadata)
FLAGS = tuple(field for field in dataclasses.fields(Recipe) if field.name not in ("name", "expected"))


def load_recipe(name_or_path: str = "digits", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A shipped recipe by its name, or a TOML file by its path; `overrides` replace single fields.

    Where they change what comes out, `expected` is emptied. Raises ValueError, TypeError or FileNotFoundError in one
    line that names the file and the key.
    """
    where, fields = _read(name_or_path)
    if not overrides:
        return _named(where, fields)
    try:  # a field that needs another one changed too (nesterov, momentum) is judged with all in place
        changed = {} if FREE.issuperset(overrides) else {"expected": ""}
        return Recipe(**{**fields, **changed, **overrides})
    except (ValueError, TypeError):
        _named(where, fields)  # blames the file, if it is wrong by itself
        raise


def stated(name_or_path: str) -> dict[str, Any]:
    """The fields that a recipe's file states. Raises as `load_recipe` does."""
    return _read(name_or_path)[1]


def _read(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """(the file's name for messages, its fields)."""
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise FileNotFoundError(
            f"no recipe {name_or_path!r}: it is neither a shipped one ({', '.join(shipped)}) nor a TOML file"
        )
    where = path.name if name_or_path in shipped else name_or_path
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not a TOML file: {error}") from error
    known = [field.name for field in dataclasses.fields(Recipe)]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    return where, {"name": path.stem, **table}


def _named(where: str, fields: dict[str, Any]) -> Recipe:
    try:
        return Recipe(**fields)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error
