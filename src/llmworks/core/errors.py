"""The whole exception tree. Every message is one line: what is wrong, where, what to do. Imports nothing.

The class decides the exit code of the command line; nothing else in the project knows exit codes.
"""


class LlmworksError(Exception):
    """Root of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UserError(LlmworksError):
    """A mistake in what the user gave: a recipe, a flag, a file. Exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """One or more mistakes in a recipe, all found before anything runs; one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(UserError):
    """A data file that is missing, empty, of the wrong schema, or not decodable."""


class ModelError(UserError):
    """A model directory or file that cannot be used as it is: truncated, of an unknown architecture, without a
    template.
    """


class ArtifactError(UserError):
    """An artifact that is missing, incomplete, tampered with, or of the wrong kind."""


class AssetError(UserError):
    """A named asset that is unknown, whose terms were not accepted, or whose bytes are not the recorded ones."""


class RequestError(UserError):
    """A request to an engine or server that cannot be answered as asked (unknown role, tools the template drops)."""


class AccessError(UserError):
    """A server that answers nothing that is sent like this: wrong key, unknown model or address, no credit.

    No further request can help.
    """


class GateFailed(LlmworksError):
    """A recipe's gate, or a verification, did not hold. Exit code 1."""


class GoldenMismatch(LlmworksError):
    """A step changed what a model computes where it must not; nothing was published. Exit code 1."""


class TrainingError(LlmworksError):
    """Training cannot go on: the loss is not a number, or no token has a label. Exit code 1."""


class EngineError(LlmworksError):
    """An engine failed while answering: a server that is down, a reply that is not the protocol's. Exit code 3."""

    exit_code = 3


class WorkerLost(LlmworksError):
    """A worker process was killed while it worked; what is done is kept. Exit code 3."""

    exit_code = 3


class MissingDependency(LlmworksError):
    """The machine lacks something; the message says what to install. Exit code 3."""

    exit_code = 3
