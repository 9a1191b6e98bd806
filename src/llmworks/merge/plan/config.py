"""Config of `merge`: mergekit's YAML unchanged.

An unsupported key is an error that names it. Does not know tensors.

https://github.com/arcee-ai/mergekit, docs/; models are referred to by the keys of the stage's input `models`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmworks.core.artifact import Config

DTYPES = {
    "bfloat16": "BF16",
    "bf16": "BF16",
    "float16": "F16",
    "fp16": "F16",
    "half": "F16",
    "float32": "F32",
    "fp32": "F32",
    "float": "F32",
    "float64": "F64",
    "double": "F64",
}


def _join_model_reference(value: Any) -> Any:
    """Return a model reference of mergekit's YAML as one string: PATH, PATH@REVISION, PATH+ADAPTER."""
    if isinstance(value, dict) and "model" in value and set(value) <= {"model", "lora"}:
        parts = [_join_path(value["model"]), *([_join_path(value["lora"])] if value.get("lora") else [])]
        return "+".join(parts)
    return _join_path(value) if isinstance(value, dict) and "path" in value else value


def _join_path(value: Any) -> str:
    if isinstance(value, dict) and set(value) <= {"path", "revision"} and "path" in value:
        return f"{value['path']}@{value['revision']}" if value.get("revision") else str(value["path"])
    if isinstance(value, str):
        return value
    raise ValueError(f"{value!r} is not a model reference; write PATH, or {{path: PATH, revision: REVISION}}")


def _dtype(value: Any) -> Any:
    if value is None or not isinstance(value, str):
        return value
    name = value.removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"{value!r} is not a supported dtype; known: {', '.join(DTYPES)}")
    return name


Ref = Annotated[str, BeforeValidator(_join_model_reference), Field(min_length=1)]
Dtype = Annotated[str | None, BeforeValidator(_dtype)]
Scalar = bool | int | float | str
StrictInt = Annotated[int, Field(strict=True)]


def drop_none(value: Any) -> Any:
    """Drop a mapping's empty keys: `parameters:` without a value counts as absent."""
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


class YamlConfig(Config):
    """A part of a YAML file, in which a key without a value counts as absent."""

    @model_validator(mode="before")
    @classmethod
    def _absent(cls, value: Any) -> Any:
        return drop_none(value)


class Condition(Config):
    """A value for tensors whose name contains a string."""

    value: Scalar | list[Scalar] = Field(
        description="a scalar, or a gradient: values interpolated linearly over the layers"
    )
    filter: str | None = Field(
        None, description="part of a tensor's name; without it, or with *, the value applies to all other tensors"
    )


Setting = Condition | list[Condition] | Scalar | list[Scalar]
Settings = dict[str, Setting]


class InputModel(YamlConfig):
    """A whole model as input."""

    model: Ref = Field(description="the model's name")
    parameters: Settings = Field({}, description="parameters of the method for this model")


class InputSlice(InputModel):
    """A range of layers of a model as input."""

    layer_range: tuple[StrictInt, StrictInt] = Field(description="first layer, and last layer + 1")

    @model_validator(mode="after")
    def _order(self) -> InputSlice:
        if not 0 <= self.layer_range[0] < self.layer_range[1]:
            raise ValueError(f"layer_range {list(self.layer_range)} contains no layer")
        return self


class OutputSlice(YamlConfig):
    """Layers of the result, merged from the same number of layers of each source."""

    sources: list[InputSlice] = Field(min_length=1, description="layer ranges that are merged")
    base_model: Ref | None = Field(None, description="which of them is the base; default: `base_model` of the merge")
    parameters: Settings = Field({}, description="parameters of the method for this slice")

    @model_validator(mode="after")
    def _alike(self) -> OutputSlice:
        lengths = {source.layer_range[1] - source.layer_range[0] for source in self.sources}
        if len(lengths) > 1:
            raise ValueError(
                f"the sources of a slice have {' and '.join(map(str, sorted(lengths)))} layers; they must have the"
                " same number"
            )
        return self


class OutputModule(YamlConfig):
    """A submodule with its own stack of layers."""

    slices: list[OutputSlice] | None = Field(None, min_length=1, description="slices of layers, in order")
    models: list[InputModel] | None = Field(None, min_length=1, description="or whole models")
    parameters: Settings = Field({}, description="parameters of the method for this module")

    @model_validator(mode="after")
    def _one(self) -> OutputModule:
        if (self.slices is None) == (self.models is None):
            raise ValueError("give either slices or models")
        return self


class Zero(Config):
    """A row of zeros."""

    kind: Literal["zero"] = Field(description="zero")


class ModelToken(Config):
    """The row of another token of a model."""

    kind: Literal["model_token"] = Field(description="model_token")
    model: Ref = Field(description="the model")
    token_id: int | None = Field(None, ge=0, description="the token's id")
    token: str | None = Field(None, description="or its string")

    @model_validator(mode="after")
    def _one(self) -> ModelToken:
        if (self.token_id is None) == (self.token is None):
            raise ValueError("give either token_id or token")
        return self


class TokenRule(Config):
    """Source of a token's embedding row."""

    source: Zero | ModelToken | Ref | None = Field(None, description="a model, another token of a model, or zero")
    force: bool = Field(False, description="apply also to models that have the token")


class TokenizerRule(YamlConfig):
    """The result's tokenizer."""

    source: Ref = Field("union", description="union of all vocabularies, base, or a model")
    tokens: dict[str, TokenRule] = Field({}, description="rules by token; tokens that no model has are added")
    pad_to_multiple_of: int | None = Field(
        None, gt=0, description="pad the embedding to a multiple of this number of rows"
    )


IgnoredFields = Annotated[
    list[str],
    Field(
        description=(
            "fields of config.json in which the models may differ, such as rope_parameters.rope_theta; the result has"
            " the base's values"
        )
    ),
]


class MergeConfig(YamlConfig):
    """Config of `merge`: mergekit's keys, and the maximum file size."""

    merge_method: str = Field(
        description=(
            "linear, slerp, nuslerp, multislerp, task_arithmetic, ties, dare_linear, dare_ties, della, della_linear,"
            " breadcrumbs, breadcrumbs_ties, model_stock, sce, arcee_fusion, nearswap, karcher, ram, ramplus_tl,"
            " passthrough"
        )
    )
    models: list[InputModel] | None = Field(None, min_length=1, description="whole models, each {model, parameters}")
    slices: list[OutputSlice] | None = Field(
        None,
        min_length=1,
        description="or slices of layers, each {sources: [{model, layer_range, parameters}], parameters}",
    )
    modules: dict[str, OutputModule] | None = Field(
        None, min_length=1, description="or submodules with their own layers, each {models or slices, parameters}"
    )
    base_model: Ref | None = Field(
        None, description="the model that task vectors are measured from; provides the result's config and tokenizer"
    )
    parameters: Settings = Field(
        {}, description="parameters of the method: scalars, gradients (lists), or [{filter, value}]"
    )
    dtype: Dtype = Field(None, description="dtype of the computation; default: that of the files")
    out_dtype: Dtype = Field(None, description="dtype of the result; default: `dtype`")
    tokenizer_source: Ref | None = Field(None, description="vocabulary of the result: union, base, or a model")
    tokenizer: TokenizerRule | None = Field(
        None, description="the same with rules by token: {source, tokens, pad_to_multiple_of}"
    )
    chat_template: str | None = Field(
        None, description="auto (the most common among the models), a template's name, or a Jinja template"
    )
    max_shard_size: int = Field(4_000_000_000, ge=1_000_000, description="maximum bytes of a file")
    ignore_config_differences: IgnoredFields = Field([])

    @model_validator(mode="after")
    def _check(self) -> MergeConfig:
        given = [name for name in ("models", "slices", "modules") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of models, slices and modules; given: {', '.join(given) or 'none'}")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("give tokenizer or tokenizer_source, not both")
        return self

    def iter_inputs(self) -> Iterator[InputModel]:
        """Yield all models that are referred to, in order."""
        yield from self.models or ()
        for part in (self.modules or {}).values():
            yield from part.models or ()
        for one in [
            *(self.slices or ()),
            *(slice_ for part in (self.modules or {}).values() for slice_ in part.slices or ()),
        ]:
            yield from one.sources

    def model_names(self) -> list[str]:
        """Return the names of models, each once, the base first."""
        bases = [
            self.base_model,
            *(one.base_model for one in self.slices or ()),
            *(one.base_model for part in (self.modules or {}).values() for one in part.slices or ()),
        ]
        rule = self.tokenizer
        tokens = [
            self.tokenizer_source,
            *(
                (
                    rule.source,
                    *(
                        one.source.model if isinstance(one.source, ModelToken) else one.source
                        for one in rule.tokens.values()
                    ),
                )
                if rule
                else ()
            ),
        ]
        others = [name for name in tokens if isinstance(name, str) and name not in ("union", "base")]
        return list(
            dict.fromkeys(name for name in [*bases, *(source.model for source in self.iter_inputs()), *others] if name)
        )
