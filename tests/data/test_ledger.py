import pytest

from tunesmith.data.preprocess.holdout import holdout_split
from tunesmith.data.preprocess.ledger import HELD_OUT, Ledger, LedgerError
from tunesmith.types import Origin


def filled() -> Ledger:
    ledger = Ledger()
    ledger.add_trained(Origin("a", 0), tokens=10, targets=4, context=6)
    ledger.add_trained(Origin("a", 1), tokens=12, targets=4, context=3, unused=3)
    ledger.explain(Origin("a", 1), "over max_length", tokens=2)
    ledger.explain(Origin("a", 1), "unanswered", tokens=3)
    ledger.add_dropped(Origin("a", 2), tokens=50)
    ledger.explain(Origin("a", 2), "over max_length", tokens=50)
    ledger.add_dropped(Origin("b", 0))
    ledger.explain(Origin("b", 0), "invalid-json", detail="line 1 is not JSON")
    ledger.add_held_out(Origin("b", 1))
    return ledger


def test_columns_add_up_by_source_and_in_total():
    ledger = filled()
    ledger.check()
    totals = ledger.totals
    assert (totals.rows, totals.tokens) == (5, 72)
    assert (totals.rows_trained, totals.rows_truncated) == (1, 1)
    assert (totals.rows_dropped, totals.rows_held_out) == (2, 1)
    assert (totals.tokens_trained, totals.tokens_context) == (8, 9)
    assert (totals.tokens_truncated, totals.tokens_dropped, totals.tokens_unused) == (2, 50, 3)
    assert ledger.sources["b"].rows == 2
    assert ledger.reasons["b"][HELD_OUT].rows == [1]
    assert ledger.reasons["b"]["invalid-json"].examples == ["b:0: line 1 is not JSON"]


def test_an_unexplained_loss_is_found():
    ledger = filled()
    ledger.add_dropped(Origin("a", 3), tokens=1)
    with pytest.raises(LedgerError, match="56 tokens lost, 55 explained"):
        ledger.check()


def test_a_row_without_a_reason_is_found():
    ledger = Ledger()
    ledger.add_dropped(Origin("a", 0))
    with pytest.raises(LedgerError, match="reason"):
        ledger.check()


def test_more_targets_than_tokens_are_found():
    ledger = Ledger()
    ledger.add_trained(Origin("a", 0), tokens=3, targets=2, context=2)
    with pytest.raises(LedgerError, match="3 tokens"):
        ledger.check()


def test_saved_and_loaded_is_the_same(tmp_path):
    ledger = filled()
    ledger.save(tmp_path / "ledger.json")
    loaded = Ledger.load(tmp_path / "ledger.json")
    assert loaded.to_dict() == ledger.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


def test_merged_ledgers_add_up():
    ledger = filled()
    ledger.merge(filled())
    ledger.totals.check("both")
    assert ledger.totals.tokens == 144
    assert ledger.reasons["a"]["over max_length"].tokens == 104


def test_every_row_is_kept_but_only_some_examples():
    ledger = Ledger()
    for row in range(100):
        ledger.add_dropped(Origin("a", row))
        ledger.explain(Origin("a", row), "empty-answer", detail="nothing")
    ledger.check()
    assert ledger.reasons["a"]["empty-answer"].rows == list(range(100))
    assert len(ledger.reasons["a"]["empty-answer"].examples) == 3


def test_what_was_held_out_is_kept(tmp_path):
    rows = [{"text": str(n)} for n in range(10)]
    choice = holdout_split(rows, count=2)
    ledger = Ledger()
    ledger.note_holdout("2", choice)
    ledger.save(tmp_path / "ledger.json")
    kept = Ledger.load(tmp_path / "ledger.json").holdout
    assert kept == {
        "asked": "2",
        "rows": 2,
        "contents": sorted(digest.hex() for digest in choice.digests),
    }


def test_a_source_that_is_named_twice_adds_up():
    ledger = Ledger()
    for _ in range(2):
        ledger.add_dropped(Origin("a", 0), tokens=5)
        ledger.explain(Origin("a", 0), "too-long", tokens=5)
    ledger.check()
    assert ledger.totals.rows_dropped == 2
