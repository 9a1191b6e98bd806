"""Plan a merge tensor by tensor from its configuration and the headers of its models.

Reads no weights and computes nothing.

As mergekit's planner: a gradient runs over the layers of a slice; tensors before the layers have the settings of the
first slice, those after them of the last.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.errors import ModelError, UserError
from llmworks.merge.plan.catalogue import METHODS, MergeMethod
from llmworks.merge.plan.config import DTYPES, InputModel, InputSlice, MergeConfig, OutputModule, OutputSlice, Setting
from llmworks.merge.plan.layout import BEFORE, HEAD, CheckpointLayout
from llmworks.merge.plan.parameters import evaluate_parameter, iter_filters
from llmworks.model.io.safetensors_io import DTYPE_BYTES, FLOAT_DTYPES, TORCH_DTYPES, promote_dtypes

BLOCK = 1 << 20  # values of each input in memory at a time


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the result: its source tensors and parameters.

    `input_parameters`: parameters of each source; `has_token_rows`: it has one row per token.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, str], ...]  # (model, tensor)
    base: int | None
    dtype: str  # of the computation
    out_dtype: str
    tensor_parameters: Mapping[str, Any]
    input_parameters: tuple[Mapping[str, Any], ...]
    has_token_rows: bool = False
    bytes_read: int = 0  # bytes of its sources


@dataclass(frozen=True)
class MergePlan:
    """All tensors of the result, in order, with what is read and written."""

    method: MergeMethod
    jobs: tuple[TensorJob, ...]
    layers: Mapping[str, tuple[tuple[str, int], ...]]  # by stack: (model, layer) of each layer's first source
    unused_parameters: tuple[str, ...] = ()  # parameters that the method does not have
    unmatched_filters: tuple[str, ...] = ()  # filters that match no tensor name

    def count_bytes(self) -> tuple[int, int]:
        """Return (bytes read, bytes written)."""
        written = sum(math.prod(job.shape) * DTYPE_BYTES[job.out_dtype] for job in self.jobs)
        return sum(job.bytes_read for job in self.jobs), written

    def estimate_seconds(self) -> float:
        """Estimate the time on one core."""
        return (
            sum(math.prod(job.shape) * len(job.sources) for job in self.jobs) * self.method.nanoseconds_per_value * 1e-9
        )


def format_layer_ranges(origins: tuple[tuple[str, int], ...]) -> list[str]:
    """Return the ranges of consecutive layers of one model."""
    found: list[list[Any]] = []
    for model, layer in origins:
        if found and found[-1][0] == model and found[-1][2] == layer - 1:
            found[-1][2] = layer
        else:
            found.append([model, layer, layer])
    return [f"{model} {low} to {high}" if high > low else f"{model} {low}" for model, low, high in found]


def plan_merge(config: MergeConfig, models: Mapping[str, CheckpointLayout], rows: int = 0) -> MergePlan:
    """Plan the merge. `rows`: vocabulary size of the result, if its tokenizer differs from those of the models.

    Errors: UserError for an unknown method, missing models, parameters of the wrong type, slices outside of a model's
    layers; ModelError for tensors that are missing or differ in shape.
    """
    method = check_models(config, models)
    planner = MergePlanner(config, models, method, rows)
    known = {parameter.name for parameter in method.parameters}
    anywhere = {parameter.name for one in METHODS.values() for parameter in one.parameters}
    strange = next((name for settings in planner.iter_settings() for name in settings if name not in anywhere), None)
    if strange is not None:
        near = difflib.get_close_matches(strange, known, n=1)
        raise UserError(
            f"merge_method {config.merge_method}: unknown parameter"
            f" {strange!r}{f', did you mean {near[0]!r}?' if near else ''}; it has {', '.join(sorted(known)) or 'none'}"
        )
    jobs = tuple(planner.iter_jobs())
    unused = sorted({name for settings in planner.iter_settings() for name in settings} - known)
    names = {name for job in jobs for name in (job.name, *(tensor for _, tensor in job.sources))}
    filters = {part for settings in planner.iter_settings() for part in iter_filters(settings)}
    idle = sorted(part for part in filters if not any(part in name for name in names))
    return MergePlan(method, jobs, planner.layers, tuple(unused), tuple(idle))


def get_method(name: str) -> MergeMethod:
    """Look up a method by name. UserError for an unknown one."""
    if name not in METHODS:
        near = "".join(f", did you mean {one!r}?" for one in difflib.get_close_matches(name, METHODS, n=1))
        raise UserError(f"merge_method: {name!r} is not known{near}; known: {', '.join(METHODS)}")
    return METHODS[name]


def check_models(config: MergeConfig, models: Mapping[str, CheckpointLayout]) -> MergeMethod:
    """Return the method. UserError for an unknown one, and for models that are referred to but not given."""
    method = get_method(config.merge_method)
    missing = [name for name in config.model_names() if name not in models]
    if missing:
        raise UserError(f"the model {missing[0]!r} is not given; given: {', '.join(models)}")
    if not config.model_names():
        raise UserError("the configuration refers to no model")
    return method


class MergePlanner:
    """Traverses a configuration; `layers` is filled on the way."""

    def __init__(
        self, config: MergeConfig, models: Mapping[str, CheckpointLayout], method: MergeMethod, rows: int
    ) -> None:
        self.config, self.models, self.method, self.rows = config, models, method, rows
        self.layers: dict[str, tuple[tuple[str, int], ...]] = {}
        self.donor = models[config.base_model or config.model_names()[0]]

    def iter_settings(self) -> Iterator[Mapping[str, Setting]]:
        """Yield all settings given anywhere."""
        yield self.config.parameters
        parts = [*(self.config.modules or {}).values()]
        for part in parts:
            yield part.parameters
        for one in [*(self.config.slices or ()), *(slice_ for part in parts for slice_ in part.slices or ())]:
            yield one.parameters
        for source in self.config.iter_inputs():
            yield source.parameters

    def iter_jobs(self) -> Iterator[TensorJob]:
        """Yield tensors before the layers, layers, and tensors after them; stack after stack."""
        parts = self.get_modules()
        first, last = next(iter(parts.values())), list(parts.values())[-1]
        settings = (first[0].parameters, self.config.parameters), (last[0].parameters, self.config.parameters)
        loose = self.list_loose_tensors(
            [source for part in parts.values() for source in (*part[1][0].sources, *part[1][-1].sources)]
        )
        for name in (one for one in loose if BEFORE.search(one)):
            yield from self.iter_loose_jobs(name, first[1][0], settings[0])
        for stack, (module, slices) in parts.items():
            yield from self.iter_stack_jobs(stack, module, slices)
        for name in (one for one in loose if not BEFORE.search(one)):
            yield from self.iter_loose_jobs(name, last[1][-1], settings[1])

    def get_modules(self) -> dict[str, tuple[OutputModule, list[OutputSlice]]]:
        """Return by stack of layers the module that describes it, and its slices."""
        stacks = list(self.donor.stacks) or [""]
        if self.config.modules is None:
            if self.config.slices is not None and len(stacks) > 1:
                raise UserError(
                    f"slices: {self.donor.name} has several stacks of layers ({', '.join(stacks)}); give modules, each"
                    " with its slices"
                )
            module = OutputModule(models=self.config.models, slices=self.config.slices)
            return {stack: (module, self.get_slices(module, stack)) for stack in stacks}
        given = self.config.modules
        if len(stacks) == 1 and len(given) == 1:
            given = {stacks[0]: next(iter(given.values()))}
        unknown = [name for name in given if name not in stacks] + [name for name in stacks if name not in given]
        if unknown:
            raise UserError(
                f"modules: {unknown[0]!r}; {self.donor.name} has the stacks of layers {', '.join(stacks)}, each of"
                " which needs a module of its name"
            )
        return {stack: (given[stack], self.get_slices(given[stack], stack)) for stack in stacks}

    def get_slices(self, module: OutputModule, stack: str) -> list[OutputSlice]:
        """Return a module's slices; whole models are one slice, the base included."""
        if module.slices is not None:
            for one in module.slices:
                for source in one.sources:
                    num_layers = len(self.models[source.model].stacks.get(stack, ()))
                    if source.layer_range[1] > num_layers:
                        raise UserError(
                            f"layer_range {list(source.layer_range)} of {source.model}: the model has {num_layers}"
                            " layers"
                        )
            return module.slices
        sources = list(module.models or ())
        base = self.config.base_model
        if base and base not in [source.model for source in sources]:
            sources.append(InputModel(model=base))
        counts = {source.model: len(self.models[source.model].stacks.get(stack, ())) for source in sources}
        if len(set(counts.values())) > 1:
            raise ModelError(
                "models of different depth cannot be merged whole:"
                f" {', '.join(f'{name} has {count} layers' for name, count in counts.items())}; give slices"
            )
        num_layers = next(iter(counts.values()))
        if not num_layers:
            return [
                OutputSlice.model_construct(
                    sources=[
                        InputSlice.model_construct(model=s.model, parameters=s.parameters, layer_range=(0, 0))
                        for s in sources
                    ],
                    base_model=None,
                    parameters={},
                )
            ]
        return [
            OutputSlice(
                sources=[
                    InputSlice(model=source.model, parameters=source.parameters, layer_range=(0, num_layers))
                    for source in sources
                ]
            )
        ]

    def iter_stack_jobs(self, stack: str, module: OutputModule, slices: Sequence[OutputSlice]) -> Iterator[TensorJob]:
        """Yield the layers of a stack."""
        origins: list[tuple[str, int]] = []
        for one in slices:
            count = one.sources[0].layer_range[1] - one.sources[0].layer_range[0]
            for offset in range(count):
                number, t = len(origins), offset / (count - 1) if count > 1 else 1.0
                layers = [
                    self.models[source.model].stacks[stack][source.layer_range[0] + offset] for source in one.sources
                ]
                for rest in dict.fromkeys(rest for layer in layers for rest in layer):
                    absent = [
                        source.model for source, layer in zip(one.sources, layers, strict=True) if rest not in layer
                    ]
                    if absent:
                        raise ModelError(
                            f"{absent[0]}: has no tensor {stack}.{one.sources[0].layer_range[0] + offset}.{rest},"
                            " which other models have"
                        )
                    yield self.make_job(
                        f"{stack}.{number}.{rest}",
                        [(source.model, layer[rest]) for source, layer in zip(one.sources, layers, strict=True)],
                        one,
                        (one.parameters, module.parameters, self.config.parameters),
                        t,
                    )
                origins.append((one.sources[0].model, one.sources[0].layer_range[0] + offset))
        self.layers[stack] = tuple(origins)

    def list_loose_tensors(self, sources: Sequence[InputSlice]) -> list[str]:
        """Return the names of tensors outside of layers, of all models that contribute some."""
        return list(dict.fromkeys(name for source in sources for name in self.models[source.model].loose))

    def iter_loose_jobs(
        self, name: str, one: OutputSlice, settings: Sequence[Mapping[str, Setting]]
    ) -> Iterator[TensorJob]:
        """Yield a tensor outside of layers.

        A head that is in no source's files is tied to the embedding in all of them, and is not written.
        """
        found = [(source.model, self.models[source.model].resolve_tied(name)) for source in one.sources]
        if (
            HEAD.search(name)
            and self.donor.text_config.get("tie_word_embeddings", True)
            and not any(name in self.models[source.model].places for source in one.sources)
        ):
            return
        absent = [model for model, tensor in found if tensor is None]
        if absent:
            raise ModelError(f"{absent[0]}: has no tensor {name}, which other models have")
        yield self.make_job(
            name, [(model, tensor) for model, tensor in found if tensor], one, (one.parameters, *settings), 0.0
        )

    def make_job(
        self,
        name: str,
        sources: list[tuple[str, str]],
        one: OutputSlice,
        settings: Sequence[Mapping[str, Setting]],
        t: float,
    ) -> TensorJob:
        """Return one tensor's job; parameters of the source come first, then of the slice, the module, and the
        merge.
        """
        where = f"merge_method {self.config.merge_method}"
        models = [model for model, _ in sources]
        base = self.find_base(models, one.base_model or self.config.base_model, name)
        places = [self.models[model].places[tensor] for model, tensor in sources]
        tokens = all(self.models[model].has_token_rows(tensor) for model, tensor in sources)
        shapes = {place.shape[1:] if tokens and self.rows else place.shape for place in places}
        if len(shapes) > 1:
            shapes_by_model = ", ".join(
                f"{model} {list(place.shape)}" for model, place in zip(models, places, strict=True)
            )
            raise ModelError(
                f"{name}: its shapes differ: {shapes_by_model}"
                + (
                    "; the vocabularies differ, give tokenizer_source: union, base or a model"
                    if len({place.shape[1:] for place in places}) == 1
                    else ""
                )
            )
        dtype = promote_dtypes(place.dtype for place in places)
        if dtype in FLOAT_DTYPES:
            dtype = DTYPES[self.config.dtype] if self.config.dtype else dtype
        wanted = self.config.out_dtype or self.config.dtype
        if dtype.startswith("F8") and (not self.method.copies_by_default or (wanted and DTYPES[wanted] != dtype)):
            raise ModelError(
                f"{models[0]}: {sources[0][1]} is in {TORCH_DTYPES[dtype]}, which can only be copied (merge_method:"
                " passthrough, no dtype), neither computed with nor converted; convert the model first"
            )
        each, shared = self._parameters(sources, one, settings, name, t, where, base)
        if dtype.startswith("F8") and any(value is not None for value in each[0].values()):
            raise ModelError(
                f"{models[0]}: {sources[0][1]} is in {TORCH_DTYPES[dtype]}, which cannot be multiplied; convert the"
                " model"
                " first"
                " model first"
            )
        shape = (self.rows, *places[0].shape[1:]) if tokens and self.rows else places[0].shape
        out = DTYPES[self.config.out_dtype] if self.config.out_dtype and dtype in FLOAT_DTYPES else dtype
        return TensorJob(
            name,
            shape,
            tuple(sources),
            base,
            dtype,
            out,
            shared,
            tuple(each),
            tokens,
            sum(place.num_bytes for place in places),
        )

    def _parameters(
        self,
        sources: list[tuple[str, str]],
        one: OutputSlice,
        settings: Sequence[Mapping[str, Setting]],
        name: str,
        t: float,
        where: str,
        base: int | None,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the parameters of each source, and of the tensor."""
        shared = {
            p.name: evaluate_parameter(p, settings, name, t, where) for p in self.method.parameters if p.of == "tensor"
        }
        each = []
        for index, (model, tensor) in enumerate(sources):
            own = [source.parameters for source in one.sources if source.model == model]
            each.append(
                {
                    p.name: evaluate_parameter(p, (*own, *settings), tensor, t, f"{where}: {model}")
                    for p in self.method.parameters
                    if p.of == "input" or (p.of == "other" and index != base)
                }
            )
        return each, shared

    def find_base(self, models: Sequence[str], base: str | None, name: str) -> int | None:
        """Return the base's index among the sources.

        UserError if the method requires one, or for too few or too many sources.
        """
        method, label = self.method, f"merge_method {self.config.merge_method}"
        if len(set(models)) < len(models):
            raise UserError(
                f"{name}: the model {next(one for one in models if list(models).count(one) > 1)} occurs twice among"
                " its sources"
            )
        if method.base == "none":
            base = None
        if base is not None and base not in models:
            raise UserError(
                f"{label}: base_model {base} is not among the sources of {name}; it must be one of a slice's sources"
            )
        if method.base == "required" and base is None:
            raise UserError(f"{label}: requires a base_model")
        others = len(models) - (base is not None)
        for count, least, most, what in (
            (len(models), method.min_models, method.max_models, "models"),
            (others, method.min_others, method.max_others, "models other than the base"),
        ):
            if count < least or (most is not None and count > most):
                wanted = (
                    f"{least}"
                    if least == most
                    else f"at most {most}"
                    if most is not None and count > most
                    else f"at least {least}"
                )
                raise UserError(f"{label}: takes {wanted} {what}, but {count} are given: {', '.join(models)}")
        return list(models).index(base) if base is not None else None
