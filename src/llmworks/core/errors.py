"""The exception hierarchy. Every message is one line: what is wrong, where, what to do. Imports nothing.

The class determines the exit code of the command line, which is defined nowhere else.
"""


class LlmworksError(Exception):
    """Base of all errors; `exit_code` is the exit code of the command line."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """Return what IPython and Jupyter show in place of a traceback: one line."""
        return [f"{type(self).__name__}: {self}"]


class UserError(LlmworksError):
    """Invalid user input: a recipe, a flag, a file. Exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """One or more errors in a recipe, all found before anything runs; one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(UserError):
    """A data file that is missing, empty, not decodable, or has the wrong schema."""


class ModelError(UserError):
    """A model directory or file that cannot be used: truncated, of an unknown architecture, without a chat template."""


class ArtifactError(UserError):
    """An artifact that is missing, incomplete, tampered with, or of the wrong kind."""


class AssetError(UserError):
    """An unknown named asset, one whose license was not accepted, or one whose bytes do not match the digest."""


class RequestError(UserError):
    """A request that an engine or server does not support (unknown role, tools the template ignores)."""


class AccessError(UserError):
    """A server that refuses every request: wrong key, unknown model or URL, no credit.

    No further request can succeed.
    """


class GateFailed(LlmworksError):
    """A recipe's gate or a verification failed. Exit code 1."""


class GoldenMismatch(LlmworksError):
    """A step changed a model's outputs where it must not; nothing was published. Exit code 1."""


class TrainingError(LlmworksError):
    """Training cannot continue: the loss is NaN, or no token has a label. Exit code 1."""


class EngineError(LlmworksError):
    """An engine failed: a server that is down, a malformed reply. Exit code 3."""

    exit_code = 3


class WorkerLost(LlmworksError):
    """A worker process was killed; finished units are kept. Exit code 3."""

    exit_code = 3


class MissingDependency(LlmworksError):
    """A missing dependency; the message says what to install. Exit code 3."""

    exit_code = 3
