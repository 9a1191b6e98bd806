"""Stage `quantize.exl2`: quantize a model to EXL2 or EXL3 by the packages exllamav2 or exllamav3, which need a GPU and
are the only ones to run the result.

The CPU equivalent is `quantize.mixed`: bits allocated by sensitivity within a budget. Golden tokens are not replayed,
since no engine of llmworks reads such files; calibration uses the package's own data.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config, Model
from llmworks.core.context import Context
from llmworks.core.errors import MissingDependency, ModelError

EXLLAMAV3_SCRIPT = (
    "import sys; from exllamav3.conversion.convert_model import main, parser, prepare; args = parser.parse_args();"
    " given, state, well, why = prepare(args); main(given, state) if well else sys.exit(str(why))"
)


class Exl2Config(Config):
    """Config of `quantize.exl2`."""

    save_format: Literal["exl2", "exl3"] = Field("exl3", description="format of exllamav2 (exl2) or exllamav3 (exl3)")
    bits: float = Field(4.0, ge=1, le=8, description="average bits per weight")
    head_bits: int = Field(6, ge=1, le=8, description="bits per weight of the output head")


def exl2(config: Exl2Config, model: Model, ctx: Context) -> Model:
    """Write the package's directory.

    Errors: MissingDependency without the package or a GPU; ModelError with the last line of output if it fails.
    """
    package = {"exl2": "exllamav2", "exl3": "exllamav3"}[config.save_format]
    rest = "quantize.mixed also allocates bits within a budget, without a GPU"
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(
            f"{config.save_format} files are written by {package}, which is not installed; on a machine with a CUDA"
            " GPU: pip"
            f" install {package}. {rest}"
        )
    import torch

    if not torch.cuda.is_available():
        raise MissingDependency(f"{package} requires a CUDA GPU, but none is available; {rest}")
    if model.format != "hf":
        raise ModelError(f"{model.name}: only a Hugging Face directory can be quantized, not {model.format}")
    work, made = ctx.scratch / "work", ctx.scratch / "made"
    work.mkdir(exist_ok=True)
    done = subprocess.run(
        build_command(config, str(model.path), str(work), str(made), resume=any(work.iterdir())),
        capture_output=True,
        text=True,
    )
    if done.returncode or not (made / "config.json").exists():
        raise ModelError(
            f"{package} failed: {((done.stderr or done.stdout).strip().splitlines() or ['no output'])[-1][:300]}"
        )
    shutil.copytree(made, ctx.out, dirs_exist_ok=True)
    size = sum(file.stat().st_size for file in ctx.out.glob("*.safetensors"))
    return Model(
        ctx.out,
        metrics={"bytes": size, "bits_per_weight": config.bits},
        about={"format": config.save_format, "bits": config.bits},
    )


def build_command(config: Exl2Config, source: str, work: str, out: str, *, resume: bool) -> list[str]:
    """Return the command of the package's converter; it resumes an interrupted run."""
    if config.save_format == "exl2":
        return [
            sys.executable,
            "-m",
            "exllamav2.conversion.convert_exl2",
            "-i",
            source,
            "-o",
            work,
            "-cf",
            out,
            "-b",
            str(config.bits),
            "-hb",
            str(config.head_bits),
        ]
    more = ["-r"] if resume else ["-i", source, "-o", out, "-b", str(config.bits), "-hb", str(config.head_bits)]
    return [sys.executable, "-c", EXLLAMAV3_SCRIPT, "-w", work, *more]
