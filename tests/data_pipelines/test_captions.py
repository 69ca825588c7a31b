import numpy as np
import pytest

from data_pipelines.samples import Rejected
from data_pipelines.stage_times import StageTimes
from data_pipelines.stages.captions import CaptionTable
from mmdit_jax.encoders import text
from mmdit_jax.encoders.dispatched import Dispatched


@pytest.fixture
def calls(monkeypatch):
    """Encoders whose outputs depend on the place in the batch, as the last bits may in truth."""
    made = []

    def dispatch(encoders, captions, *, trimmed):
        made.append(list(captions))
        values = [float(caption) + place / 100 for place, caption in enumerate(captions)]
        sequence_BTD = np.array(values, np.float32)[:, None, None] * np.ones((1, 2, 3), np.float32)
        return Dispatched(None, lambda: {"t5": {"sequence": sequence_BTD}})

    monkeypatch.setattr(text, "dispatch", dispatch)
    return made


def ask(table, captions):
    table.dispatch(captions, StageTimes())
    return table.fields(captions)


CAPTIONS = [str(number) for number in range(10)]


def test_outputs_do_not_depend_on_what_was_asked_before(calls):
    def ask_all(order):
        table = CaptionTable({}, CAPTIONS + CAPTIONS[::-1], 4)
        return {caption: ask(table, [caption])["text/t5/sequence"] for caption in order}

    forward, backward = ask_all(CAPTIONS), ask_all(CAPTIONS[::-1])
    for caption in CAPTIONS:
        np.testing.assert_array_equal(forward[caption], backward[caption])
        assert int(forward[caption][0, 0, 0]) == int(caption)


def test_equal_captions_are_encoded_once_and_always_in_full_batches(calls):
    table = CaptionTable({}, CAPTIONS * 3, 4)
    for caption in CAPTIONS * 3:
        ask(table, [caption, CAPTIONS[0]])
    assert calls == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["6", "7", "8", "9"]]


def test_fewer_captions_than_a_batch_are_one_call(calls):
    fields = ask(CaptionTable({}, ["5", "7"], 4), ["7", "5", "7"])
    assert calls == [["5", "7"]]
    assert fields["text/t5/sequence"].shape == (3, 2, 3)
    assert fields["text/t5/sequence"].dtype == np.float16
    assert fields["text/t5/sequence"][:, 0, 0].astype(int).tolist() == [7, 5, 7]


def test_what_half_precision_cannot_hold_is_rejected_by_name(calls):
    table = CaptionTable({}, [*"123456", "70000"], 4)
    ask(table, ["1"])
    with pytest.raises(Rejected, match="text/t5/sequence of '70000'"):
        ask(table, ["1", "70000"])
