"""The built-in data set: which library does this docstring come from?

It is made on the spot from the source files of the libraries that safe_lab depends on, so a first run needs no
download. The texts are first paragraphs of docstrings. What would give the answer away is taken out of them
(:func:`mask_names`), texts that say nearly the same are kept once, every library has the same number of texts in a
split, and no directory of a library feeds two splits. Nothing is imported and nothing is written: files are found by
their package and read with :mod:`ast`. The same versions of the libraries give the same rows, in the same order.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safe_lab.data.tasks import LIBRARIES

if TYPE_CHECKING:
    import datasets

Documented = ast.Module | ast.ClassDef | ast.FunctionDef

# A small train split on purpose: with thousands of texts a bag of words learns the libraries' vocabulary, and what a
# pre-trained encoder knows already no longer shows.
SPLIT_SIZES = {"train": 720, "validation": 600, "test": 600}
MASK = "it"

MIN_CHARACTERS, ENOUGH_CHARACTERS, MAX_CHARACTERS = 60, 100, 400
MIN_PLAIN_WORDS = 6
MAX_MASKED_SHARE = 1 / 3
MAX_JACCARD = 0.4
SHINGLE_WORDS = 3
PARAGRAPHS_READ_PER_LIBRARY = 700

# Directories that hold tests, or code copied from elsewhere (it would carry the wrong label).
_SKIPPED_PARTS = {"tests", "test", "testing", "externals", "_external", "_vendor", "_vendored", "vendor", "third_party"}
_SKIPPED_PARTS |= {"array_api_compat", "array_api_extra"}
_LIBRARY_WORDS = "networkx|numpy|pandas|sqlalchemy|scipy|scikit|sklearn|sympy|torch|transformer|hugging"
_ALIASES = "nx|np|pd|sp|hf|face"

_CODE = re.compile(
    r":\w+:`[^`]*`"  # roles
    r"|https?://\S+"
    r"|\b(?!e\.g|i\.e)[A-Za-z_]\w*(?:\.\w+)+"  # dotted names
    r"|\b[A-Za-z_]\w*\([^()]*\)"  # calls
    r"|\b\w*(?:_\w|\w_)\w*"  # snake_case
    r"|\b\w*[a-z]\w*[A-Z]\w*"  # CamelCase
    r"|\b[A-Za-z]+\d\w*"  # float32, conv2d
)
_LIBRARY = re.compile(rf"\b(?:[\w-]*(?:{_LIBRARY_WORDS})[\w-]*|{_ALIASES})\b", re.IGNORECASE)
_REPEATED_MASK = re.compile(rf"\b{MASK}\b(?:[\s,/.:*-]+{MASK}\b)+")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_SECTION = re.compile(
    r"^\s*(?:Args|Arguments|Parameters|Returns?|Yields|Raises|Warnings?|Examples?|Notes?|References)\s*:?\s*$",
    re.MULTILINE,
)
_NOT_PROSE = re.compile(r">>>|:param|:return|::|\.\. |[|@{}\\]|={3}|-{3}|~{3}|^[A-Z][\w ]*:$")


@dataclass(frozen=True)
class Paragraph:
    """A masked first paragraph and where it stands.

    Attributes:
        text: The paragraph, masked, in one line.
        library: The library it comes from.
        module: The file it comes from, relative to the folder that holds the library.
    """

    text: str
    library: str
    module: str

    @property
    def directory(self) -> str:
        """The folder of the file: what no two splits share."""
        return self.module.rpartition("/")[0]


def load_docstrings() -> dict[str, datasets.Dataset]:
    """Build the splits ``train``, ``validation`` and ``test`` with the columns ``text``, ``label`` and ``module``.

    Labels are the library's index in :data:`LIBRARIES`. Where a library has too few texts for :data:`SPLIT_SIZES`,
    every class shrinks to what it has, so that classes stay balanced.

    Raises:
        RuntimeError: A library is not installed, or installed without its sources.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=list(LIBRARIES)), "module": Value("string")}
    )
    return {
        split: Dataset.from_dict(
            {
                "text": [paragraph.text for paragraph in paragraphs],
                "label": [LIBRARIES.index(paragraph.library) for paragraph in paragraphs],
                "module": [paragraph.module for paragraph in paragraphs],
            },
            features=features,
        )
        for split, paragraphs in select(read_paragraphs(LIBRARIES)).items()
    }


def read_paragraphs(libraries: Sequence[str]) -> list[Paragraph]:
    """Read, mask and filter the first paragraphs of each library, about :data:`PARAGRAPHS_READ_PER_LIBRARY` of each.

    Files are read in the order of a hash of their path, which mixes a library's parts, until there are enough.
    """
    roots = {library: _find_sources(library) for library in libraries}
    raw: list[Paragraph] = []
    names: set[str] = set()
    with _no_collection():
        for library, root in roots.items():
            num_read = 0
            for path in _list_files(root):
                if num_read >= PARAGRAPHS_READ_PER_LIBRARY:
                    break
                tree = ast.parse(path.read_bytes())
                documented = list(_list_documented(tree))
                names.update(node.name for node in documented if isinstance(node, ast.ClassDef))
                module = path.relative_to(root.parent).as_posix()
                found = [Paragraph(text, library, module) for text in map(_read_opening, documented) if text]
                num_read += len(found)
                raw.extend(found)
    modules = {path.stem.strip("_").lower() for root in roots.values() for path in root.iterdir()}
    # sympy has a module that is called this.
    modules = {module for module in modules if len(module) >= 3} - {"this"}
    masked = (Paragraph(mask_names(p.text, modules=modules, classes=names), p.library, p.module) for p in raw)
    return [paragraph for paragraph in masked if _is_prose(paragraph.text)]


def mask_names(text: str, *, modules: set[str], classes: set[str]) -> str:
    """Put :data:`MASK`, the same word for all libraries, in place of what names a library or a part of it.

    These are: roles, addresses, dotted names, calls, ``snake_case``, ``CamelCase`` and names with digits; words
    that hold a library's name, and its usual alias; a library's top-level ``modules`` as whole words, in any case; and
    ``classes`` written as they are defined, unless they open a sentence, where any word has a capital. Several masks in
    a row become one.

    >>> mask_names("Convert a NumPy array or pd.Series to a Tensor.", modules=set(), classes={"Tensor"})
    'Convert a it array or it to a it.'
    """
    text = _LIBRARY.sub(MASK, _CODE.sub(MASK, text))

    def mask_word(match: re.Match[str]) -> str:
        word = match.group()
        opens_sentence = match.start() == 0 or text[: match.start()].rstrip().endswith((".", ":"))
        return MASK if word.lower() in modules or (word in classes and not opens_sentence) else word

    return _REPEATED_MASK.sub(MASK, _WORD.sub(mask_word, text))


def drop_near_duplicates(paragraphs: Iterable[Paragraph]) -> list[Paragraph]:
    """Keep a text only if it is not nearly the same as one kept before it, of whichever library.

    Nearly the same: the sets of word triples have a Jaccard index above :data:`MAX_JACCARD`. Only texts that share a
    triple are compared, by an index from triple to texts.
    """
    kept: list[Paragraph] = []
    sizes: list[int] = []
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for paragraph in paragraphs:
        shingles = _shingle(paragraph.text)
        num_shared: dict[int, int] = defaultdict(int)
        for shingle in shingles:
            for index in holders[shingle]:
                num_shared[index] += 1
        if any(n / (len(shingles) + sizes[index] - n) > MAX_JACCARD for index, n in num_shared.items()):
            continue
        for shingle in shingles:
            holders[shingle].append(len(kept))
        sizes.append(len(shingles))
        kept.append(paragraph)
    return kept


def select(paragraphs: Iterable[Paragraph]) -> dict[str, list[Paragraph]]:
    """Choose balanced splits that share no directory and no near-duplicate, in an order that mixes the libraries."""
    by_library: dict[str, list[Paragraph]] = defaultdict(list)
    for paragraph in drop_near_duplicates(sorted(paragraphs, key=lambda p: _digest(p.text))):
        by_library[paragraph.library].append(paragraph)
    quotas = {split: size // len(by_library) for split, size in SPLIT_SIZES.items()}
    drawn = {library: _draw_splits(texts, quotas) for library, texts in by_library.items()}
    splits = {}
    for split in quotas:
        num_per_library = min(len(by_split[split]) for by_split in drawn.values())
        chosen = [paragraph for by_split in drawn.values() for paragraph in by_split[split][:num_per_library]]
        splits[split] = sorted(chosen, key=lambda p: _digest(p.text))
    return splits


def _draw_splits(paragraphs: Sequence[Paragraph], quotas: Mapping[str, int]) -> dict[str, list[Paragraph]]:
    """Deal one library's directories out to the splits, then draw from them in turn, up to the quota of each split.

    The largest directory comes first, and goes to the split that is furthest from its quota. A directory counts for a
    quarter of a quota at most, so that no split rests on a single part of the library.
    """
    directories: dict[str, list[Paragraph]] = defaultdict(list)
    for paragraph in paragraphs:
        directories[paragraph.directory].append(paragraph)
    dealt: dict[str, list[list[Paragraph]]] = {split: [] for split in quotas}
    filled = dict.fromkeys(quotas, 0.0)
    for _, texts in sorted(directories.items(), key=lambda item: (-len(item[1]), item[0])):
        split = min(quotas, key=lambda name: filled[name])
        dealt[split].append(texts)
        filled[split] += min(len(texts) / quotas[split], 0.25)
    drawn = {}
    for split, groups in dealt.items():
        longest = max((len(group) for group in groups), default=0)
        in_turn = [group[turn] for turn in range(longest) for group in groups if turn < len(group)]
        drawn[split] = in_turn[: quotas[split]]
    return drawn


def baselines(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    validation_texts: Sequence[str],
    validation_labels: Sequence[int],
) -> dict[str, float]:
    """Validation accuracy of what needs no language model.

    ``majority`` always answers with the commonest label of train. ``bag_of_words`` is logistic regression on TF-IDF
    weights of words and pairs of words.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    train, validation = vectorizer.fit_transform(train_texts), vectorizer.transform(validation_texts)
    models = {"majority": DummyClassifier(), "bag_of_words": LogisticRegression(C=10.0, max_iter=1000)}
    return {
        name: float(model.fit(train, train_labels).score(validation, validation_labels))
        for name, model in models.items()
    }


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the collector of cycles, which looks at the nodes of syntax trees over and over and finds none: half the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _find_sources(library: str) -> Path:
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise RuntimeError(
            f"data.task=docstrings reads the sources of {library}, which is not installed with its sources"
        )
    return Path(spec.origin).parent


def _list_files(root: Path) -> list[Path]:
    files = [path for path in root.rglob("*.py") if not _SKIPPED_PARTS.intersection(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: _digest(path.relative_to(root).as_posix()))


def _list_documented(node: Documented) -> Iterator[Documented]:
    """The module and its public classes, functions and methods."""
    yield node
    if not isinstance(node, ast.FunctionDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
                yield from _list_documented(child)


def _read_opening(node: Documented) -> str:
    """The docstring's first paragraphs in one line, until there are enough characters; empty if they never are.

    A paragraph that is no prose (a list of arguments, a heading with its rule, an example) ends the opening.
    """
    opening = ""
    for paragraph in _SECTION.split(ast.get_docstring(node) or "")[0].split("\n\n"):
        text = " ".join(paragraph.split())
        if len(opening) >= ENOUGH_CHARACTERS or _NOT_PROSE.search(text):
            break
        opening = f"{opening} {text}".lstrip()
    return opening if MIN_CHARACTERS <= len(opening) <= MAX_CHARACTERS else ""


def _is_prose(text: str) -> bool:
    words = _WORD.findall(text)
    num_masks = words.count(MASK)
    return (
        MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS
        and len(words) - num_masks >= MIN_PLAIN_WORDS
        and num_masks <= MAX_MASKED_SHARE * len(words)
        and _NOT_PROSE.search(text) is None
    )


def _shingle(text: str) -> set[tuple[str, ...]]:
    words = [word.lower() for word in _WORD.findall(text)]
    return {tuple(words[start : start + SHINGLE_WORDS]) for start in range(len(words) - SHINGLE_WORDS + 1)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
