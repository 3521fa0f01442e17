"""Rows of the table of official classes, and reading constructor arguments by them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dyntoken.models import Model, create_model
from dyntoken.nn import layers
from dyntoken.registry import suggest
from dyntoken.weights.errors import WeightsError

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Argument:
    """One constructor argument.

    Attributes:
      default: the class's own.
      convert: the value as we spell it; raises ValueError with the reason where we lack it.
      field: our keyword of `create_model` that it becomes; None: read by the row's `more`, or by nobody.
    """

    default: Any
    convert: Callable[[Any], Any] = lambda value: value
    field: str | None = None


def to(field: str, convert: Callable[[Any], Any], default: Any) -> Argument:
    """An argument that becomes one of our fields."""
    return Argument(default, convert, field)


def only(default: Any, *others: Any, why: str) -> Argument:
    """An argument that must have its default or one of the `others`."""
    allowed = (default, *others)

    def convert(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"only {' or '.join(map(repr, allowed))} is implemented: {why}")
        return value

    return Argument(default, convert)


def unused(**defaults: Any) -> dict[str, Argument]:
    """Arguments that change neither parameters nor results, or that the class never reads."""
    return {name: Argument(value) for name, value in defaults.items()}


def with_defaults(arguments: Mapping[str, Argument], **defaults: Any) -> dict[str, Argument]:
    """The same arguments, some with another default."""
    changed = {name: dataclasses.replace(arguments[name], default=value) for name, value in defaults.items()}
    return {**arguments, **changed}


@dataclasses.dataclass(frozen=True)
class Official:
    """An official class.

    Attributes:
      preset: our model's name; every field that its size stands for is overridden.
      arguments: of the constructor.
      more: converted arguments -> fields made of several of them; "method" is that of the
        model's name, and "no_embed_class" says that the position embedding lacks prefix rows.
    """

    preset: str
    arguments: Mapping[str, Argument]
    more: Callable[[Values], dict[str, Any]] = lambda values: {}

    def build(self, cls: str, given: Values) -> Reference:
        """The model that equals the class with these arguments."""
        for name in given:
            if name not in self.arguments:
                raise WeightsError(
                    f"{cls} has no constructor argument {name!r}: {suggest(name, self.arguments)}"
                )
        values, fields = {}, {}
        for name, argument in self.arguments.items():
            value = given.get(name, argument.default)
            try:
                values[name] = argument.convert(value)
            except (TypeError, ValueError) as error:
                raise WeightsError(f"{cls}({name}={value!r}) cannot be imported: {error}") from error
            if argument.field is not None:
                fields[argument.field] = values[name]
        try:
            fields.update(self.more(values))
            method, bare = fields.pop("method", None), fields.pop("no_embed_class", False)
            model = create_model(f"{method}_{self.preset}" if method else self.preset, **fields)
        except ValueError as error:
            raise WeightsError(f"{cls} cannot be imported: {error}") from error
        return Reference(model, model.plain().prefix if bare else 0)


@dataclasses.dataclass(frozen=True)
class Reference:
    """An official model in this library's terms.

    Attributes:
      model: the equivalent model.
      grid_only: number of prefix rows that the reference's position embedding
        lacks (`no_embed_class`), else 0.
    """

    model: Model
    grid_only: int = 0


# Converters


def ints(value: Sequence[Any]) -> tuple[int, ...]:
    """One int per stage."""
    return tuple(int(v) for v in value)


def flag(value: Any) -> bool:
    """A bool; also in the words of a case description ("True for ...", "not used")."""
    if not isinstance(value, str):
        return bool(value)
    for start, meaning in (("true", True), ("false", False), ("not used", False)):
        if value.lower().startswith(start):
            return meaning
    raise ValueError("give True or False")


def positive(value: Any) -> float | None:
    """A number; None, 0 and the like mean none."""
    return float(value) if value else None


def optional(convert: Callable[[Any], Any], none: Any = None) -> Callable[[Any], Any]:
    """`convert`, where None means `none`."""
    return lambda value: none if value is None else convert(value)


def per_stage(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One value, or one per stage (or block)."""
    return lambda value: tuple(map(convert, value)) if isinstance(value, (list, tuple)) else convert(value)


def epsilon(default: float) -> Callable[[Any], float]:
    """LayerNorm epsilon of a `norm_layer`: None, or text such as "LayerNorm(eps=1e-6)"."""

    def convert(value: Any) -> float:
        if value is None:
            return default
        if not re.search(r"\bLayerNorm\b", str(value)):
            raise ValueError("only LayerNorm is implemented: another norm is another function")
        found = re.search(r"eps\s*=?\s*([0-9.eE+-]+)", str(value))
        return float(found.group(1)) if found else 1e-5  # torch's own default

    return convert


def called(text: Any, name: str) -> dict[str, str] | Any:
    """The keywords of a call in text, "TPSModule(temperature=2)"; other values as they are.

    Raises:
      ValueError: another function, or arguments without a name.
    """
    if not isinstance(text, str):
        return text
    found = re.fullmatch(rf"\s*{name}\s*(?:\((.*)\))?\s*", text)
    if not found:
        raise ValueError(f"only {name}(...) is implemented")
    pairs = [part.split("=") for part in (found.group(1) or "").split(",") if part.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("write its arguments as name=value")
    return {key.strip(): value.strip() for key, value in pairs}


def activation(value: Any) -> str:
    """`act_layer`: timm's name or a class's, "nn.SiLU"; None is GELU."""
    name = str(value or "gelu").rsplit(".", 1)[-1].lower().replace("_", "")
    names = {own.replace("_", ""): own for own in layers.ACTIVATIONS if own != "swiglu"} | {"swish": "silu"}
    if name not in names:
        raise ValueError(
            f"{suggest(name, names)} (an activation with parameters, or given as code, is not read)"
        )
    return names[name]


# Arguments of several classes

CODE = "another one is code, which no table reads"
IMAGES = {
    "img_size": to("img_size", per_stage(int), 224),
    "in_chans": to("in_chans", int, 3),
    "num_classes": to("num_classes", int, 1000),
}
DROP_PATH = {"drop_path_rate": to("drop_path", float, 0.0)}
DROPOUT = {"drop_rate": to("dropout", float, 0.0)}
ATTN_DROPOUT = {"attn_drop_rate": to("attn_dropout", float, 0.0)}
HEAD_DROPOUT = {"drop_rate": to("head_dropout", float, 0.0)}
QK_SCALE = {"qk_scale": to("qk_scale", positive, None)}
NORM = {"norm_layer": to("norm_eps", epsilon(1e-5), None)}
ACTIVATION = {"act_layer": to("activation", activation, None)}
USUAL = {**DROP_PATH, **DROPOUT, **ATTN_DROPOUT, **QK_SCALE, **NORM}


def pruned(a: Values) -> dict[str, Any]:
    """DynamicViT's sites."""
    return {"method": "dynamicvit", **sites(a["pruning_loc"], a.get("token_ratio", a.get("sparse_ratio")))}


def sites(at: Sequence[int] | None, ratios: Sequence[float] | None) -> dict[str, Any]:
    """Where and how much DynamicViT and TPS prune; both take the ratios in the order of the blocks."""
    if not at or not ratios:
        raise ValueError("pruning_loc and its ratios are needed")
    if len(ratios) < len(set(at)):
        raise ValueError(f"{len(ratios)} keep ratios for {len(set(at))} prune locations")
    at = tuple(sorted({int(index) for index in at}))
    return {"at": at, "keep": tuple(float(ratio) for ratio in ratios[: len(at)])}
