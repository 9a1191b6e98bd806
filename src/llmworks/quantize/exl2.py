"""Stage `quantize.exl2`: hands a model over to exllamav2 or exllamav3, whose files only they write, on a GPU, and only
they run.

What it is on a CPU is `quantize.mixed`: bits by what each part costs, within a budget. The golden tokens are not
replayed here, since no engine of llmworks reads such files; the package's own calibration texts are used.
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

THIRD = (
    "import sys; from exllamav3.conversion.convert_model import main, parser, prepare; args = parser.parse_args();"
    " given, state, well, why = prepare(args); main(given, state) if well else sys.exit(str(why))"
)


class Exl2Config(Config):
    """Which form, and how many bits."""

    save_format: Literal["exl2", "exl3"] = Field("exl3", description="of exllamav2, or of exllamav3")
    bits: float = Field(4.0, ge=1, le=8, description="of a weight on average")
    head_bits: int = Field(6, ge=1, le=8, description="of the head's weights")


def exl2(config: Exl2Config, model: Model, ctx: Context) -> Model:
    """Write the package's directory.

    Errors: MissingDependency without the package or a GPU; ModelError when it fails, with its last line.
    """
    package = {"exl2": "exllamav2", "exl3": "exllamav3"}[config.save_format]
    rest = "quantize.mixed gives bits within a budget in the same manner, without a GPU"
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(
            f"{config.save_format} files are written by {package}, which is not installed; on a machine with a CUDA GPU: pip"
            f" install {package}. {rest}"
        )
    import torch

    if not torch.cuda.is_available():
        raise MissingDependency(f"{package} needs a CUDA GPU, and there is none here; {rest}")
    if model.format != "hf":
        raise ModelError(f"{model.name}: a Hugging Face directory is quantized, this is {model.format}")
    work, made = ctx.scratch / "work", ctx.scratch / "made"
    work.mkdir(exist_ok=True)
    done = subprocess.run(
        command(config, str(model.path), str(work), str(made), resume=any(work.iterdir())),
        capture_output=True,
        text=True,
    )
    if done.returncode or not (made / "config.json").exists():
        raise ModelError(
            f"{package} failed: {((done.stderr or done.stdout).strip().splitlines() or ['it said nothing'])[-1][:300]}"
        )
    shutil.copytree(made, ctx.out, dirs_exist_ok=True)
    size = sum(file.stat().st_size for file in ctx.out.glob("*.safetensors"))
    return Model(
        ctx.out,
        metrics={"bytes": size, "bits_per_weight": config.bits},
        about={"format": config.save_format, "bits": config.bits},
    )


def command(config: Exl2Config, source: str, work: str, out: str, *, resume: bool) -> list[str]:
    """The package's own converter; it goes on where a stopped one was."""
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
    return [sys.executable, "-c", THIRD, "-w", work, *more]
