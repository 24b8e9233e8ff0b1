import logging

import pytest
from fpo.cache.errors import reading

library = logging.getLogger("datasets.some.reader")


def test_what_a_library_raises_is_one_line_with_its_first_cause_and_its_log_is_left_out(caplog):
    with (
        pytest.raises(ValueError, match=r"\Adata\.json: not readable: KeyError: 'a'\Z"),
        reading("data.json: not readable"),
    ):
        library.error("it failed")
        try:
            raise KeyError("a")
        except KeyError as error:
            raise RuntimeError("several\nlines") from error
    assert caplog.records == []


def test_what_a_library_logs_is_passed_on_where_it_raises_nothing(caplog):
    with reading("data.json: not readable"):
        library.warning("odd, but well")
    assert [record.message for record in caplog.records] == ["odd, but well"]


def test_a_stop_by_the_user_is_not_the_file_s_fault():
    with pytest.raises(KeyboardInterrupt), reading("data.json: not readable"):
        raise KeyboardInterrupt
