"""The only stage table. `resolve.py` finds an entry's function, its config class, its inputs and what it makes.

Entries are strings, so that listing stages imports nothing. Third parties add stages by the entry point group
`llmworks.stages`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # listing stages, as help does, must not cost the import of pydantic
    from llmworks.core.artifact import Derivation


@dataclass(frozen=True)
class Stage:
    """One row of the table: where the function is, the revision of its behaviour, whether its bytes can be derived
    again.
    """

    target: str
    revision: int
    derivation: Derivation
    summary: str
    inputs: str = ""  # function that adds the inputs that are not given: (config, given, load) -> inputs
    estimate: str = ""  # function that says what a training takes before it runs: (recipe, found, step) -> estimate
    converts: str = ""  # what it makes of things from outside, where they are named in its place
    internal: bool = False  # made by a workflow that gives it results; left out of help and docs


# the same bytes anywhere; on the same platform and versions; or not comparable: trainings, remote engines
EXACT: Derivation = "exact"
PLATFORM: Derivation = "exact-on-this-platform"
DECLARED: Derivation = "declared"

STAGES: dict[str, Stage] = {
    "data.read": Stage("llmworks.data.read:read", 1, EXACT, "raw files of many formats to documents"),
    "data.query": Stage("llmworks.data.query:query", 1, DECLARED, "the rows of a SQL query to documents"),
    "data.clean": Stage("llmworks.data.clean:clean", 2, EXACT, "mend documents, drop bad text by the published rules"),
    "data.classify": Stage(
        "llmworks.data.classify:classify", 2, PLATFORM, "learn what good text is, score, keep the better part"
    ),
    "data.dedup": Stage("llmworks.data.dedup:dedup", 2, EXACT, "keep one of each cluster of exact or near duplicates"),
    "data.semdedup": Stage("llmworks.data.semdedup:semdedup", 1, PLATFORM, "keep one of each cluster of like meaning"),
    "data.decontaminate": Stage(
        "llmworks.data.decontaminate:decontaminate", 2, EXACT, "find training documents that hold test rows"
    ),
    "data.redact": Stage("llmworks.data.redact:redact", 2, EXACT, "replace, tag or drop personal data and secrets"),
    "data.chat": Stage(
        "llmworks.data.chat:chat",
        6,
        EXACT,
        "raw rows of any usual shape to conversations or preference pairs",
        converts="chat",
    ),
    "data.doctor": Stage(
        "llmworks.data.doctor:doctor", 4, EXACT, "would this model learn from these conversations what is meant?"
    ),
    "data.show": Stage(
        "llmworks.data.show:show",
        3,
        EXACT,
        "look at conversations, pairs or packed tokens: statistics, and a page of chats",
    ),
    "data.export": Stage(
        "llmworks.data.export:export", 4, EXACT, "conversations or preference pairs back to JSONL, in any shape"
    ),
    "data.pack": Stage(
        "llmworks.data.pack:pack",
        3,
        EXACT,
        "conversations or documents as full rows of tokens, in shards that training maps",
    ),
    "data.map": Stage(
        "llmworks.data.map:map", 2, PLATFORM, "documents as points in clusters: an interactive page and a picture"
    ),
    "data.mix": Stage("llmworks.data.mix:mix", 2, EXACT, "several sets as one, by weights, shuffled"),
    "data.split": Stage("llmworks.data.split:split", 4, EXACT, "one side of a seeded split, groups kept together"),
    "data.overlap": Stage("llmworks.data.overlap:overlap", 1, EXACT, "count what two data sets share"),
    "tokenize.train": Stage(
        "llmworks.tokenize.train:train", 2, PLATFORM, "a tokenizer of documents: BPE, Unigram or WordPiece"
    ),
    "tokenize.compare": Stage(
        "llmworks.tokenize.compare:compare", 2, EXACT, "several tokenizers on the same texts, in figures and in colour"
    ),
    "model.new": Stage("llmworks.model.new:new", 3, PLATFORM, "an untrained decoder of any shape"),
    "model.recurrent": Stage(
        "llmworks.model.recurrent:recurrent", 3, PLATFORM, "an untrained RNN, LSTM, GRU or window model"
    ),
    "model.show": Stage(
        "llmworks.model.show:show", 2, EXACT, "look inside a model, or two side by side: layers, work, cache, a drawing"
    ),
    "model.embedding": Stage(
        "llmworks.model.embedding:embedding",
        2,
        DECLARED,
        "word vectors of documents: Word2Vec, FastText or GloVe, scored",
    ),
    "model.from_gguf": Stage(
        "llmworks.model.from_gguf:from_gguf", 2, EXACT, "a GGUF file to a Hugging Face directory", converts="model"
    ),
    "train.compare": Stage(
        "llmworks.train.compare:compare", 2, EXACT, "trainings side by side: at equal tokens, at equal time"
    ),
    "train.ngram": Stage(
        "llmworks.train.ngram:ngram", 3, PLATFORM, "count an n-gram model of packed tokens (Kneser-Ney)"
    ),
    "train.pretrain": Stage(
        "llmworks.train.pretrain:pretrain",
        3,
        DECLARED,
        "train a model on packed tokens",
        estimate="llmworks.workflows.estimate:pretraining_of",
    ),
    "train.scaling": Stage(
        "llmworks.train.scaling:scaling",
        2,
        DECLARED,
        "many small trainings, the law that they follow, and a larger one predicted",
    ),
    "train.sft": Stage(
        "llmworks.train.sft:sft",
        4,
        DECLARED,
        "supervised fine-tuning of an adapter or of all weights, loss on answers",
        estimate="llmworks.workflows.estimate:finetuning_of",
    ),
    "train.prune": Stage(
        "llmworks.train.prune:prune",
        3,
        PLATFORM,
        "a model without the blocks that change their input least, to be taught",
    ),
    "train.distill": Stage(
        "llmworks.train.distill:distill",
        2,
        DECLARED,
        "a student learns a teacher's chances of tokens, or its answers",
        estimate="llmworks.workflows.estimate:finetuning_of",
    ),
    "train.lr_finder": Stage(
        "llmworks.train.lr_finder:lr_finder",
        3,
        DECLARED,
        "a learning rate for a fine-tuning, by a short run at rising rates",
    ),
    "merge": Stage("llmworks.merge.merge:merge", 5, PLATFORM, "several models as one, by mergekit's YAML"),
    "merge.experts": Stage(
        "llmworks.merge.experts:experts", 3, PLATFORM, "dense models as experts of one (frankenMoE, upcycling)"
    ),
    "merge.find_parents": Stage(
        "llmworks.merge.find_parents:find_parents", 2, PLATFORM, "which models a model was made of, told by its weights"
    ),
    "merge.transplant": Stage("llmworks.merge.transplant:transplant", 3, PLATFORM, "a model with another tokenizer"),
    "merge.combine_adapters": Stage(
        "llmworks.merge.combine_adapters:combine_adapters", 5, PLATFORM, "several LoRA adapters as one"
    ),
    "merge.extract": Stage(
        "llmworks.merge.extract:extract", 4, PLATFORM, "a LoRA adapter of what a model differs by from its base"
    ),
    "merge.adapter": Stage("llmworks.merge.adapter:adapter", 3, PLATFORM, "fold an adapter into its model"),
    "quantize.rotate": Stage(
        "llmworks.quantize.rotate:rotate",
        3,
        PLATFORM,
        "the same model, its states turned so that no column is large; to be quantized next",
    ),
    "quantize.rtn": Stage(
        "llmworks.quantize.rtn:rtn", 2, PLATFORM, "weights as whole numbers, each the nearest (absmax, zero point)"
    ),
    "quantize.gptq": Stage(
        "llmworks.quantize.gptq:gptq",
        6,
        PLATFORM,
        "whole numbers, each column making up for the errors of those before it",
    ),
    "quantize.awq": Stage(
        "llmworks.quantize.awq:awq", 5, PLATFORM, "whole numbers, columns that read large inputs made larger before"
    ),
    "quantize.mixed": Stage(
        "llmworks.quantize.mixed:mixed",
        5,
        PLATFORM,
        "whole numbers of more bits where a model bears least to lose them, within a budget",
    ),
    "quantize.smoothquant": Stage(
        "llmworks.quantize.smoothquant:smoothquant",
        4,
        PLATFORM,
        "weights and inputs in 8 bits, what is large in inputs moved into weights",
    ),
    "quantize.int8": Stage(
        "llmworks.quantize.int8:int8", 4, PLATFORM, "weights and inputs in 8 bits, but for large inputs (LLM.int8())"
    ),
    "quantize.hqq": Stage(
        "llmworks.quantize.hqq:hqq",
        5,
        PLATFORM,
        "whole numbers with real zero points that leave few weights far off (HQQ)",
    ),
    "quantize.nf4": Stage(
        "llmworks.quantize.nf4:nf4",
        4,
        PLATFORM,
        "4 bits of bitsandbytes: quantiles of a normal distribution, or floats",
    ),
    "quantize.zeroquant": Stage(
        "llmworks.quantize.zeroquant:zeroquant",
        4,
        PLATFORM,
        "weights in groups, inputs by token, each block taught to answer as before",
    ),
    "quantize.exl2": Stage(
        "llmworks.quantize.exl2:exl2", 2, DECLARED, "handed over to exllamav2 or exllamav3, on a GPU"
    ),
    "quantize.imatrix": Stage(
        "llmworks.quantize.imatrix:imatrix",
        2,
        PLATFORM,
        "what matrices read and what formats would cost them: llama.cpp's importance matrix, and more",
    ),
    "quantize.gguf": Stage("llmworks.quantize.gguf:gguf", 5, PLATFORM, "a Hugging Face directory to one GGUF file"),
    "quantize.adapter": Stage(
        "llmworks.quantize.adapter:adapter", 1, PLATFORM, "a LoRA adapter as a GGUF file that llama.cpp puts on a model"
    ),
    "align.dpo": Stage(
        "llmworks.align.dpo:dpo", 2, DECLARED, "the better of two answers becomes more probable (DPO and its family)"
    ),
    "align.cpo": Stage(
        "llmworks.align.cpo:cpo", 2, DECLARED, "the same without a reference, better answers learned beside it"
    ),
    "align.simpo": Stage(
        "llmworks.align.simpo:simpo",
        2,
        DECLARED,
        "the same by mean log-probabilities and a margin, without a reference",
    ),
    "align.orpo": Stage(
        "llmworks.align.orpo:orpo", 2, DECLARED, "fine-tuning and preferences in one, by odds, without a reference"
    ),
    "align.kto": Stage("llmworks.align.kto:kto", 2, DECLARED, "single answers, each good or bad, in place of pairs"),
    "align.reward": Stage("llmworks.align.reward:reward", 2, DECLARED, "a model that scores answers, learned of pairs"),
    "align.process": Stage(
        "llmworks.align.process:process", 2, DECLARED, "a model that scores steps of answers, learned of labelled steps"
    ),
    "align.grpo": Stage(
        "llmworks.align.grpo:grpo",
        3,
        DECLARED,
        "the policy's own answers, each beside the others to its prompt (GRPO and its kin)",
    ),
    "align.rloo": Stage(
        "llmworks.align.rloo:rloo", 3, DECLARED, "the same by whole answers, each less the mean of the others (RLOO)"
    ),
    "align.ppo": Stage(
        "llmworks.align.ppo:ppo", 3, DECLARED, "the same with a model of what each token is worth (PPO)"
    ),
    "align.online_dpo": Stage(
        "llmworks.align.online_dpo:online_dpo", 3, DECLARED, "DPO on pairs that the policy has just written"
    ),
    "evaluate": Stage(
        "llmworks.evaluate.evaluate:evaluate",
        3,
        DECLARED,
        "a task on a model, sample by sample",
        inputs="llmworks.evaluate.protocol.inputs:task_inputs",
    ),
    "evaluate.arena": Stage(
        "llmworks.evaluate.arena:arena", 2, EXACT, "ratings of models by votes of people and judges, with intervals"
    ),
    "evaluate.leaderboard": Stage(
        "llmworks.evaluate.leaderboard:leaderboard",
        3,
        EXACT,
        "evaluations side by side: a leaderboard, a model card's section",
    ),
    "evaluate.contamination": Stage(
        "llmworks.evaluate.contamination:contamination",
        2,
        EXACT,
        "the score of samples that a model may have seen in training, and of the others",
    ),
    "evaluate.error_analysis": Stage(
        "llmworks.evaluate.error_analysis:error_analysis",
        2,
        PLATFORM,
        "where a model fails: by topic, length, group and kind of error",
    ),
    "evaluate.to_training": Stage(
        "llmworks.evaluate.to_training:to_training",
        2,
        EXACT,
        "failed rows as conversations to train on, apart from those it is tested on",
        inputs="llmworks.evaluate.protocol.inputs:practice_inputs",
    ),
    "evaluate.select": Stage(
        "llmworks.evaluate.select:select",
        3,
        EXACT,
        "of several models the best by its evaluations, and which skills it keeps",
    ),
    "evaluate.judge": Stage(
        "llmworks.evaluate.judge:judge",
        2,
        DECLARED,
        "models judge answers: grades, or the better of two, alone or as a jury",
    ),
    "evaluate.compare": Stage(
        "llmworks.evaluate.compare:compare", 4, EXACT, "paired test of two evaluations, and why samples differ"
    ),
    "synthesize.verifiable": Stage(
        "llmworks.synthesize.verifiable:verifiable",
        2,
        EXACT,
        "instructions that can be verified, with answers made by rule",
    ),
    "synthesize.instruct": Stage(
        "llmworks.synthesize.instruct:instruct", 2, DECLARED, "new tasks from seed tasks, answered (Self-Instruct)"
    ),
    "synthesize.evolve": Stage(
        "llmworks.synthesize.evolve:evolve",
        3,
        DECLARED,
        "instructions made harder or other, step by step (Evol-Instruct)",
    ),
    "synthesize.personas": Stage(
        "llmworks.synthesize.personas:personas", 2, DECLARED, "people who would read a text, and what they ask"
    ),
    "synthesize.grounded": Stage(
        "llmworks.synthesize.grounded:grounded", 2, DECLARED, "questions and answers that stand in documents"
    ),
    "synthesize.reason": Stage(
        "llmworks.synthesize.reason:reason", 2, DECLARED, "answers with reasoning that ends at the known answer"
    ),
    "synthesize.sample": Stage(
        "llmworks.synthesize.sample:sample", 2, DECLARED, "several answers to a question, those that a verifier accepts"
    ),
    "synthesize.branch": Stage(
        "llmworks.synthesize.branch:branch", 2, DECLARED, "a question divided, solved in parts, merged"
    ),
    "synthesize.pairs": Stage(
        "llmworks.synthesize.pairs:pairs", 2, DECLARED, "preference pairs by verifier, judge or ratings"
    ),
    "tune.benchmark": Stage(
        "llmworks.tune.benchmark:benchmark", 4, DECLARED, "what it takes to run a model here: memory, speeds, answers"
    ),
    "tune.tradeoff": Stage(
        "llmworks.tune.tradeoff:tradeoff",
        3,
        EXACT,
        "the page of a model's quantizations: sizes, damage, speeds, skills",
        internal=True,
    ),
    "tune.evolution": Stage(
        "llmworks.tune.evolution:evolution", 2, DECLARED, "the page of a search for a merge's numbers", internal=True
    ),
    "tune.trials": Stage(
        "llmworks.tune.trials:trials",
        2,
        DECLARED,
        "the page of a sweep: what was tried, what came of it",
        internal=True,
    ),
    "lineage.report": Stage(
        "llmworks.lineage.report:report", 2, DECLARED, "one page: family tree, curves, scores, samples, sizes"
    ),
}


@functools.cache
def table() -> dict[str, Stage]:
    """The built-in stages and those of installed packages.

    An entry point names a `Stage` object; built-in names win.
    """
    from importlib.metadata import entry_points

    return {**{point.name: point.load() for point in entry_points(group="llmworks.stages")}, **STAGES}
