"""Will the rows teach what was meant: their tokens, what carries loss, what is there twice."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config
from src.data.dataset import Document, TokenDataset, load_documents
from src.data.describe import data_notes, show_document
from src.data.duplicates import repeated, shared
from src.data.encoding import stop_token_ids
from src.doctor import Finding
from src.models.model import check_positions, load_tokenizer
from src.preflight import check_run
from src.utils.errors import UserError

LOOKED_AT = 200  # documents whose tokens are looked at
SHOWN = 400  # characters of the example
LOOK = "uv run scripts/look.py {}"


def check_rows(config: Config, marks: tuple[str, str], arguments: str) -> Iterator[Finding]:
    """Read and tokenise what training would, which it then need not do again.

    Args:
        config: of the run.
        marks: around what carries loss in the example.
        arguments: config and keys of the command line, for commands that are advised.
    """
    try:
        check_run(config, output=False)
        check_positions(config.model, config.data.max_length)
        tokenizer = load_tokenizer(config.model)
        train, other = load_documents(config, tokenizer)
    except UserError as error:
        yield from (Finding("FAIL", problem) for problem in error.problems)
        return
    shown = show_document(train[[0]][0], tokenizer, marks)
    yield Finding("OK", f"the first: {shown if len(shown) <= SHOWN else f'{shown[:SHOWN]} …'}")
    documents = train[list(range(min(LOOKED_AT, len(train))))]
    yield _beginning(documents, tokenizer)
    yield _end(documents, tokenizer)
    look = LOOK.format(arguments).strip()
    yield from _counts("data.train", train, config, look)
    if other is None:
        yield Finding("WARN", "nothing is evaluated on", "data.eval=0.05 takes a share of the rows")
    elif config.training.overfit is None:
        yield from _counts("data.eval", other, config, look)
        if both := shared(other, train):
            text = f"{both:,} of {len(other):,} documents of data.eval are in data.train"
            yield Finding("WARN", text, "data.eval=0.05 keeps a share of data.train out of it")
        else:
            yield Finding("OK", "no document of data.eval is in data.train")


def _beginning(documents: list[Document], tokenizer: Tokenizer) -> Finding:
    bos = tokenizer.bos_token_id
    begin = [document.input_ids[:2].tolist() for document in documents]
    twice = begin.count([bos, bos])
    if bos is not None and twice and bos != tokenizer.eos_token_id:
        text = f"{twice} of {len(begin)} documents begin with two BOS tokens"
        return Finding("FAIL", text, "take bos_token out of model.chat_template, or its rows")
    once = sum(ids[:1] == [bos] for ids in begin)
    if not once and bos is not None and tokenizer("")["input_ids"][:1] == [bos]:
        text = f"no document begins with {tokenizer.bos_token}, as the tokenizer would"
        return Finding("WARN", text, "write {{ bos_token }} first in model.chat_template")
    return Finding(
        "OK", f"{once} of {len(begin)} documents begin with one BOS token, none with two"
    )


def _end(documents: list[Document], tokenizer: Tokenizer) -> Finding:
    stops = stop_token_ids(tokenizer)
    names = ", ".join(map(repr, map(str, tokenizer.convert_ids_to_tokens(stops))))
    taught = sum(bool({*document.labels.tolist()} & {*stops}) for document in documents)
    text = f"{taught} of {len(documents)} documents teach a stop token ({names})"
    if taught == len(documents):
        return Finding("OK", text)
    mend = "a larger data.max_length where rows are cut; else a model.chat_template that ends turns"
    return Finding("WARN" if taught else "FAIL", text, mend)


def _counts(name: str, data: TokenDataset, config: Config, look: str) -> Iterator[Finding]:
    tokens, labelled = int(data.lengths.sum()), data.facts.labelled_tokens
    text = f"{name}: {len(data):,} documents, {tokens:,} tokens, {labelled:,} of them labelled"
    yield Finding("OK", text)
    # A share has the facts of the whole file, as data.train has them.
    share = name == "data.eval" and isinstance(config.data.eval, float)
    notes = [] if share else list(data_notes(data.facts, config.data))
    if again := repeated(data):
        notes.append(f"{again:,} documents repeat another one")
    for note in notes:
        yield Finding("WARN", f"{name}: {note}", look if note == notes[-1] else "")
    if not notes:
        yield Finding("OK", f"{name}: no row is cut, left out or there twice")
