"""Look at the rows before training: `uv run scripts/look.py [CONFIG] [key=value ...]`.

Prints how rows were read, their lengths, what carries loss, what is left out, duplicates, and the
first documents as the model will see them, with what carries loss in colour (or between [ and ]).
CONFIG and keys are those of scripts/train.py.
"""

import sys

from src.utils.environment import load_environment
from src.utils.errors import run_script
from src.utils.imports import quick_imports

EXAMPLES = 3


def main(arguments: list[str]) -> None:
    """Read and tokenise what training would, and train nothing."""
    if "-h" in arguments or "--help" in arguments:
        print(__doc__.strip())
        return
    load_environment()
    from src.config import from_command_line
    from src.preflight import check_run

    config, _ = from_command_line(arguments)
    check_run(config, output=False)

    with quick_imports():
        from src.data.dataset import load_documents
        from src.data.describe import show_document
        from src.data.look import GREEN, describe_data
        from src.models.model import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    train, other = load_documents(config, tokenizer)
    print(*describe_data("data.train", train, config.data), sep="\n")
    if other is not None:
        print(*describe_data("data.eval", other, config.data, train), sep="\n")
    marks = GREEN if sys.stdout.isatty() else ("[", "]")
    for document in train[list(range(min(EXAMPLES, len(train))))]:
        print(f"\n--- document {document.row + 1}, {len(document.input_ids)} tokens")
        print(show_document(document, tokenizer, marks))


if __name__ == "__main__":
    run_script(main)
