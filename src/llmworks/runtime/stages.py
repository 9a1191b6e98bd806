"""The stage table. `resolve.py` finds an entry's function, config class, inputs and output.

Entries are strings, so that listing stages imports nothing. Third parties add stages by the entry point group
`llmworks.stages`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # listing stages for help must not import pydantic
    from llmworks.core.artifact import Derivation


@dataclass(frozen=True)
class Stage:
    """One row of the table: the function, the revision of its behavior, and whether its bytes are reproducible."""

    target: str
    revision: int
    derivation: Derivation
    summary: str
    inputs: str = ""  # function that adds default inputs: (config, given, load) -> inputs
    estimate: str = ""  # function that estimates a training before it runs: (recipe, found, step) -> estimate
    converts: str = ""  # kind or schema it converts external artifacts to, when one is used as an input
    internal: bool = False  # called by a workflow only; omitted from help and docs

    # reproducible anywhere; on the same platform and versions; or not at all: training, remote engines


EXACT: Derivation = "exact"
PLATFORM: Derivation = "exact-on-this-platform"
DECLARED: Derivation = "declared"

STAGES: dict[str, Stage] = {
    "data.read": Stage("llmworks.data.read:read", 4, EXACT, "Read raw files of many formats as documents"),
    "data.query": Stage("llmworks.data.query:query", 2, DECLARED, "Read the rows of a SQL query as documents"),
    "data.clean": Stage(
        "llmworks.data.clean:clean",
        3,
        EXACT,
        "Clean and filter documents by published heuristics (Gopher, C4, FineWeb)",
    ),
    "data.classify": Stage(
        "llmworks.data.classify:classify", 3, PLATFORM, "Train a quality classifier, score documents and keep the best"
    ),
    "data.dedup": Stage("llmworks.data.dedup:dedup", 3, EXACT, "Remove exact and near duplicates (MinHash)"),
    "data.semdedup": Stage("llmworks.data.semdedup:semdedup", 2, PLATFORM, "Remove semantic duplicates (SemDeDup)"),
    "data.decontaminate": Stage(
        "llmworks.data.decontaminate:decontaminate", 3, EXACT, "Find training documents that contain test rows"
    ),
    "data.redact": Stage("llmworks.data.redact:redact", 2, EXACT, "Replace, tag or drop personal data and secrets"),
    "data.chat": Stage(
        "llmworks.data.chat:chat",
        8,
        EXACT,
        "Convert raw rows of common formats to conversations or preference pairs",
        converts="chat",
    ),
    "data.doctor": Stage(
        "llmworks.data.doctor:doctor", 6, EXACT, "Check a data set and chat template for training faults"
    ),
    "data.show": Stage(
        "llmworks.data.show:show", 3, EXACT, "Show conversations, pairs or packed tokens: statistics and samples"
    ),
    "data.export": Stage(
        "llmworks.data.export:export", 5, EXACT, "Export conversations or preference pairs to JSONL in common formats"
    ),
    "data.pack": Stage(
        "llmworks.data.pack:pack", 5, EXACT, "Tokenize and pack conversations or documents into memory-mapped shards"
    ),
    "data.map": Stage(
        "llmworks.data.map:map", 2, PLATFORM, "Map documents as clustered points: an interactive page and a picture"
    ),
    "data.mix": Stage("llmworks.data.mix:mix", 2, EXACT, "Mix several data sets by weights, shuffled"),
    "data.split": Stage(
        "llmworks.data.split:split", 4, EXACT, "Take one part of a seeded split, keeping groups together"
    ),
    "data.overlap": Stage("llmworks.data.overlap:overlap", 2, EXACT, "Measure the overlap of two data sets"),
    "tokenize.train": Stage(
        "llmworks.tokenize.train:train", 2, PLATFORM, "Train a tokenizer on documents: BPE, Unigram or WordPiece"
    ),
    "tokenize.compare": Stage("llmworks.tokenize.compare:compare", 2, EXACT, "Compare tokenizers on the same texts"),
    "model.new": Stage("llmworks.model.new:new", 3, PLATFORM, "Create an untrained decoder of any shape"),
    "model.recurrent": Stage(
        "llmworks.model.recurrent:recurrent", 3, PLATFORM, "Create an untrained RNN, LSTM, GRU or fixed-window model"
    ),
    "model.show": Stage(
        "llmworks.model.show:show",
        2,
        EXACT,
        "Show a model's architecture, or compare two: layers, operations, KV cache, a drawing",
    ),
    "model.embedding": Stage(
        "llmworks.model.embedding:embedding",
        2,
        DECLARED,
        "Train and score word embeddings on documents: Word2Vec, FastText or GloVe",
    ),
    "model.from_gguf": Stage(
        "llmworks.model.from_gguf:from_gguf",
        3,
        EXACT,
        "Convert a GGUF file to a Hugging Face directory",
        converts="model",
    ),
    "train.compare": Stage(
        "llmworks.train.compare:compare", 2, EXACT, "Compare training runs at equal tokens and at equal time"
    ),
    "train.ngram": Stage(
        "llmworks.train.ngram:ngram", 3, PLATFORM, "Train an n-gram model on packed tokens (Kneser-Ney)"
    ),
    "train.pretrain": Stage(
        "llmworks.train.pretrain:pretrain",
        4,
        DECLARED,
        "Pretrain a model on packed tokens",
        estimate="llmworks.workflows.estimate:describe_pretraining",
    ),
    "train.scaling": Stage(
        "llmworks.train.scaling:scaling", 2, DECLARED, "Fit a scaling law to many small runs and predict a larger one"
    ),
    "train.sft": Stage(
        "llmworks.train.sft:sft",
        5,
        DECLARED,
        "Run supervised fine-tuning (SFT) of an adapter or all weights",
        estimate="llmworks.workflows.estimate:describe_finetuning",
    ),
    "train.prune": Stage(
        "llmworks.train.prune:prune",
        3,
        PLATFORM,
        "Prune the blocks that change their input least; retrain the model afterwards",
    ),
    "train.distill": Stage(
        "llmworks.train.distill:distill",
        2,
        DECLARED,
        "Distill a teacher into a student, by token probabilities or completions",
        estimate="llmworks.workflows.estimate:describe_finetuning",
    ),
    "train.lr_finder": Stage(
        "llmworks.train.lr_finder:lr_finder",
        3,
        DECLARED,
        "Find a learning rate for fine-tuning by a short run with a rising rate",
    ),
    "merge": Stage("llmworks.merge.merge:merge", 5, PLATFORM, "Merge several models by mergekit's YAML"),
    "merge.experts": Stage(
        "llmworks.merge.experts:experts", 3, PLATFORM, "Combine dense models into a mixture of experts (upcycling)"
    ),
    "merge.find_parents": Stage(
        "llmworks.merge.find_parents:find_parents", 2, PLATFORM, "Find a model's parents from its weights"
    ),
    "merge.transplant": Stage(
        "llmworks.merge.transplant:transplant", 3, PLATFORM, "Transplant another tokenizer into a model"
    ),
    "merge.combine_adapters": Stage(
        "llmworks.merge.combine_adapters:combine_adapters", 5, PLATFORM, "Combine several LoRA adapters into one"
    ),
    "merge.extract": Stage(
        "llmworks.merge.extract:extract", 4, PLATFORM, "Extract a LoRA adapter from a model's difference to its base"
    ),
    "merge.adapter": Stage("llmworks.merge.adapter:adapter", 3, PLATFORM, "Fold an adapter into its model"),
    "quantize.rotate": Stage(
        "llmworks.quantize.rotate:rotate", 3, PLATFORM, "Rotate hidden states to spread outliers before quantization"
    ),
    "quantize.rtn": Stage(
        "llmworks.quantize.rtn:rtn", 2, PLATFORM, "Quantize weights by round-to-nearest (absmax, zero point)"
    ),
    "quantize.gptq": Stage(
        "llmworks.quantize.gptq:gptq", 6, PLATFORM, "Quantize weights column by column with error compensation (GPTQ)"
    ),
    "quantize.awq": Stage(
        "llmworks.quantize.awq:awq", 5, PLATFORM, "Quantize weights after activation-aware scaling (AWQ)"
    ),
    "quantize.mixed": Stage(
        "llmworks.quantize.mixed:mixed",
        5,
        PLATFORM,
        "Quantize with mixed precision: more bits for sensitive weights, within a budget",
    ),
    "quantize.smoothquant": Stage(
        "llmworks.quantize.smoothquant:smoothquant",
        4,
        PLATFORM,
        "Quantize weights and activations to 8 bits, moving outliers into the weights (SmoothQuant)",
    ),
    "quantize.int8": Stage(
        "llmworks.quantize.int8:int8",
        4,
        PLATFORM,
        "Quantize weights and activations to 8 bits but outliers (LLM.int8())",
    ),
    "quantize.hqq": Stage(
        "llmworks.quantize.hqq:hqq",
        5,
        PLATFORM,
        "Quantize weights with real-valued zero points by half-quadratic optimization (HQQ)",
    ),
    "quantize.nf4": Stage(
        "llmworks.quantize.nf4:nf4", 4, PLATFORM, "Quantize weights to 4 bits as bitsandbytes does: NF4 or FP4"
    ),
    "quantize.zeroquant": Stage(
        "llmworks.quantize.zeroquant:zeroquant",
        4,
        PLATFORM,
        "Quantize weights per group and activations per token, with block-wise distillation (ZeroQuant)",
    ),
    "quantize.exl2": Stage(
        "llmworks.quantize.exl2:exl2", 2, DECLARED, "Quantize with exllamav2 or exllamav3, on a GPU"
    ),
    "quantize.imatrix": Stage(
        "llmworks.quantize.imatrix:imatrix",
        2,
        PLATFORM,
        "Compute llama.cpp's importance matrix and each matrix's sensitivity to formats",
    ),
    "quantize.gguf": Stage(
        "llmworks.quantize.gguf:gguf", 5, PLATFORM, "Convert a Hugging Face directory to one GGUF file"
    ),
    "quantize.adapter": Stage(
        "llmworks.quantize.adapter:adapter", 2, PLATFORM, "Convert a LoRA adapter to a GGUF file for llama.cpp"
    ),
    "align.dpo": Stage("llmworks.align.dpo:dpo", 2, DECLARED, "Train on preference pairs (DPO and its variants)"),
    "align.cpo": Stage(
        "llmworks.align.cpo:cpo", 2, DECLARED, "Train on preference pairs with an NLL term, reference-free (CPO)"
    ),
    "align.simpo": Stage(
        "llmworks.align.simpo:simpo",
        2,
        DECLARED,
        "Train on preference pairs by mean log-probability and a margin, without a reference model (SimPO)",
    ),
    "align.orpo": Stage(
        "llmworks.align.orpo:orpo",
        2,
        DECLARED,
        "Combine fine-tuning and preference training by odds ratio, without a reference model (ORPO)",
    ),
    "align.kto": Stage("llmworks.align.kto:kto", 2, DECLARED, "Train on single completions labeled good or bad (KTO)"),
    "align.reward": Stage("llmworks.align.reward:reward", 2, DECLARED, "Train a reward model on preference pairs"),
    "align.process": Stage(
        "llmworks.align.process:process", 2, DECLARED, "Train a process reward model on labeled steps"
    ),
    "align.grpo": Stage(
        "llmworks.align.grpo:grpo",
        3,
        DECLARED,
        "Train with group-relative advantages of the policy's completions (GRPO and its variants)",
    ),
    "align.rloo": Stage(
        "llmworks.align.rloo:rloo", 3, DECLARED, "Train with a leave-one-out baseline on whole completions (RLOO)"
    ),
    "align.ppo": Stage("llmworks.align.ppo:ppo", 3, DECLARED, "Train with a value model and GAE (PPO)"),
    "align.online_dpo": Stage(
        "llmworks.align.online_dpo:online_dpo", 3, DECLARED, "Train by DPO on pairs sampled from the policy"
    ),
    "evaluate": Stage(
        "llmworks.evaluate.evaluate:evaluate",
        5,
        DECLARED,
        "Evaluate a model on a task, sample by sample",
        inputs="llmworks.evaluate.protocol.task_inputs:task_inputs",
    ),
    "evaluate.arena": Stage(
        "llmworks.evaluate.arena:arena", 2, EXACT, "Rate models by votes of people and judges (Bradley-Terry, Elo)"
    ),
    "evaluate.leaderboard": Stage(
        "llmworks.evaluate.leaderboard:leaderboard", 3, EXACT, "Build a leaderboard and model card from evaluations"
    ),
    "evaluate.contamination": Stage(
        "llmworks.evaluate.contamination:contamination",
        2,
        EXACT,
        "Compare scores on samples possibly seen in training and on clean ones",
    ),
    "evaluate.error_analysis": Stage(
        "llmworks.evaluate.error_analysis:error_analysis",
        2,
        PLATFORM,
        "Analyze a model's errors by topic, length, group and error type",
    ),
    "evaluate.to_training": Stage(
        "llmworks.evaluate.to_training:to_training",
        2,
        EXACT,
        "Turn failed rows into training conversations, separate from test rows",
        inputs="llmworks.evaluate.protocol.task_inputs:practice_inputs",
    ),
    "evaluate.select": Stage(
        "llmworks.evaluate.select:select", 3, EXACT, "Select the best of several models by its evaluations"
    ),
    "evaluate.judge": Stage(
        "llmworks.evaluate.judge:judge", 2, DECLARED, "Judge answers by models: grades or pairwise, alone or as a jury"
    ),
    "evaluate.compare": Stage(
        "llmworks.evaluate.compare:compare", 5, EXACT, "Compare two evaluations by a paired test, sample by sample"
    ),
    "synthesize.verifiable": Stage(
        "llmworks.synthesize.verifiable:verifiable", 2, EXACT, "Generate verifiable instructions, answered by rule"
    ),
    "synthesize.instruct": Stage(
        "llmworks.synthesize.instruct:instruct",
        2,
        DECLARED,
        "Generate tasks and answers from seed tasks (Self-Instruct)",
    ),
    "synthesize.evolve": Stage(
        "llmworks.synthesize.evolve:evolve", 3, DECLARED, "Evolve instructions in depth and breadth (Evol-Instruct)"
    ),
    "synthesize.personas": Stage(
        "llmworks.synthesize.personas:personas", 2, DECLARED, "Derive personas from texts, and tasks that they ask"
    ),
    "synthesize.grounded": Stage(
        "llmworks.synthesize.grounded:grounded", 2, DECLARED, "Generate questions with answers grounded in documents"
    ),
    "synthesize.reason": Stage(
        "llmworks.synthesize.reason:reason", 2, DECLARED, "Generate reasoning that ends at the known answer"
    ),
    "synthesize.sample": Stage(
        "llmworks.synthesize.sample:sample",
        4,
        DECLARED,
        "Sample several answers per question, keep those a verifier accepts (rejection sampling)",
    ),
    "synthesize.branch": Stage(
        "llmworks.synthesize.branch:branch", 2, DECLARED, "Divide a question, solve the parts, merge the answers"
    ),
    "synthesize.pairs": Stage(
        "llmworks.synthesize.pairs:pairs", 2, DECLARED, "Build preference pairs by verifier, judge or ratings"
    ),
    "tune.benchmark": Stage(
        "llmworks.tune.benchmark:benchmark", 4, DECLARED, "Benchmark a model on this machine: memory and speed"
    ),
    "tune.tradeoff": Stage(
        "llmworks.tune.tradeoff:tradeoff",
        3,
        EXACT,
        "Report a model's quantizations: size, quality loss, speed, skills",
        internal=True,
    ),
    "tune.evolution": Stage(
        "llmworks.tune.evolution:evolution",
        2,
        DECLARED,
        "Report an evolutionary search for merge parameters",
        internal=True,
    ),
    "tune.trials": Stage(
        "llmworks.tune.trials:trials",
        2,
        DECLARED,
        "Report a hyperparameter sweep: trials and results",
        internal=True,
    ),
    "lineage.report": Stage(
        "llmworks.lineage.report:report",
        3,
        DECLARED,
        "Write a lineage page: family tree, curves, scores, samples, sizes",
    ),
}


@functools.cache
def get_stages() -> dict[str, Stage]:
    """Return the built-in stages and those of installed packages.

    An entry point names a `Stage` object; built-in names take precedence.
    """
    from importlib.metadata import entry_points

    return {**{point.name: point.load() for point in entry_points(group="llmworks.stages")}, **STAGES}
