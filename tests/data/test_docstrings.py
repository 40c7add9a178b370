import re
from collections import Counter

import pytest

from safe_lab.data import docstrings as subject
from safe_lab.data.docstrings import Paragraph, baselines, drop_near_duplicates, load_docstrings, mask_names
from safe_lab.data.tasks import LIBRARIES

SPLITS = ("train", "validation", "test")


def test_the_same_versions_give_the_same_rows(docstrings):
    again = load_docstrings()
    assert {split: dataset.to_dict() for split, dataset in again.items()} == {
        split: dataset.to_dict() for split, dataset in docstrings.items()
    }


def test_no_directory_feeds_two_splits(docstrings):
    directories = [{module.rpartition("/")[0] for module in docstrings[split]["module"]} for split in SPLITS]
    assert sum(map(len, directories)) == len(set().union(*directories))


def test_no_text_names_a_library(docstrings):
    names = re.compile("|".join([*LIBRARIES, "scikit", "hugging", r"\bnp\b", r"\bpd\b", r"\bnx\b"]), re.IGNORECASE)
    assert [text for split in SPLITS for text in docstrings[split]["text"] if names.search(text)] == []


def test_classes_are_balanced(docstrings):
    for split in SPLITS:
        assert len(set(Counter(docstrings[split]["label"]).values())) == 1
        assert set(docstrings[split]["label"]) == set(range(len(LIBRARIES)))


def test_splits_are_large_enough_to_tell_results_apart(docstrings):
    assert len(docstrings["train"]) >= 600 and min(len(docstrings["validation"]), len(docstrings["test"])) >= 400


def test_no_text_of_validation_is_nearly_one_of_another_split(docstrings):
    def shingles(split):
        return [subject._shingle(text) for text in docstrings[split]["text"]]

    others = shingles("train") + shingles("test")
    for own in shingles("validation"):
        for other in others:
            shared = len(own & other)
            assert shared <= subject.MAX_JACCARD * (len(own) + len(other) - shared)


def test_a_near_duplicate_from_another_library_is_dropped():
    text = "compute the weighted sum of all the rows of the given matrix along one axis"
    kept = drop_near_duplicates([Paragraph(text, "a", "a/x.py"), Paragraph(text + " now", "b", "b/y.py")])
    assert [paragraph.library for paragraph in kept] == ["a"]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Like numpy.linalg.norm but faster.", "Like it but faster."),
        ("See :class:`~torch.nn.Linear` for more", "See it for more"),
        ("PyTorch's own loop", "it's own loop"),
        ("a scikit-learn estimator", "a it estimator"),
        ("Fit the Tensor, e.g. by hand.", "Fit the it, e.g. by hand."),
        ("Tensor shapes are kept.", "Tensor shapes are kept."),
        ("uses the stats of rows", "uses the it of rows"),
        ("call fit(x, y) first", "call it first"),
    ],
)
def test_names_are_masked(text, masked):
    assert mask_names(text, modules={"stats"}, classes={"Tensor"}) == masked


def test_missing_library_is_named():
    with pytest.raises(RuntimeError, match="no_such_library"):
        subject.read_paragraphs(["no_such_library"])


def test_baselines_worked_by_hand():
    texts = ["red apple", "red cherry", "blue sea", "blue sky", "blue lake"]
    assert baselines(texts, [0, 0, 1, 1, 1], ["red wine", "blue ink"], [0, 1]) == {"majority": 0.5, "bag_of_words": 1.0}


def test_task_is_neither_trivial_nor_hopeless_for_a_bag_of_words(docstrings):
    columns = [docstrings[split][column] for split in ("train", "validation") for column in ("text", "label")]
    reference = baselines(*map(list, columns))
    assert reference["majority"] == pytest.approx(1 / len(LIBRARIES))
    assert 2 / len(LIBRARIES) < reference["bag_of_words"] < 0.9
