"""Find a model, and turn what a library raises while it reads one into a line for the user."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from src.utils.environment import from_root
from src.utils.errors import UserError, first_line

ABSENT = (
    "is not on this machine and could not be fetched: check the name, the network, HF_HUB_OFFLINE "
    "and HF_TOKEN (in the environment or .env), or give a local folder"
)
ANOTHER = "was made for another base model"
# What a library's message contains, in lower case, and what to say instead.
ADVICE = {
    "gated repo": "is gated: ask for access on its page at huggingface.co, then put your token "
    "into .env as HF_TOKEN",
    "trust_remote_code": "ships its own Python code; read it, then set "
    "model.trust_remote_code=true to run it with your rights",
    "out of memory": "does not fit: try model.quantization=4bit, or a smaller model",
    "couldn't connect": ABSENT,
    "offline mode": ABSENT,
    "not a valid model": ABSENT,
    "can't find 'adapter_config.json'": ABSENT,
    "the backend tokenizer": "has no tokenizer.json: fetch it",
    "`tiktoken` is required": "has no tokenizer.json: fetch it, or uv add sentencepiece",
    "ignore_mismatched_sizes": "has weights of other sizes than its config.json: fetch both again",
    "size mismatch": ANOTHER,
    "not found in the base model": ANOTHER,
}


@contextmanager
def explained(what: str) -> Generator[None]:
    """Turn the many ways in which reading or saving a model fails into one line for the user.

    Args:
        what: the key or option that named the model, and its name: `model.name: org/name`.

    Raises:
        UserError: for any exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - each library raises its own kinds
        text = str(error).lower()
        advice = (advice for sign, advice in ADVICE.items() if sign in text)
        raise UserError(f"{what} {next(advice, f'cannot be used: {first_line(error)}')}") from None


def check_numbers(model: nn.Module, what: str) -> None:
    """Refuse weights that are NaN or infinite: the model would answer with any token.

    Raises:
        UserError: naming the first of them.
    """
    for name, p in model.named_parameters():
        known = p.is_floating_point() and not p.is_meta
        # The sum takes a tenth of the time; in fp16 it may overflow.
        if known and not p.sum().isfinite() and not p.isfinite().all():
            raise UserError(f"{what}: {name} holds numbers that are NaN or infinite")


def resolve(name: str) -> str:
    """A local folder as an absolute path, so that an adapter finds its base from anywhere.

    Args:
        name: a folder, relative to the project's root, or a hub id, which stays as it is.
    """
    folder = from_root(name)
    return str(folder.resolve()) if folder.is_dir() else name
