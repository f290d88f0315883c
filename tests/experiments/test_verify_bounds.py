from __future__ import annotations

import runpy
import sys

import pytest

from experiments import verify_bounds
from stability import bounds
from stability.row_moments import sigmoid_derivative


def test_prints_a_table_and_succeeds(capsys) -> None:
    assert verify_bounds.main(["--dtype", "float16", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    for expected in ("63,488", "65,280", "mathematics", "native", "every real z", "every bound holds"):
        assert expected in printed


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_broken_derivative_fails_the_command(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bounds, "sigmoid_derivative", lambda x: 1.001 * sigmoid_derivative(x))
    monkeypatch.setattr(sys, "argv", ["verify_bounds", "--dtype", "float16"])
    with pytest.raises(SystemExit) as error:
        runpy.run_module("experiments.verify_bounds", run_name="__main__")
    assert error.value.code == 1
    assert "1 of 9 bounds BROKEN" in capsys.readouterr().out


def test_a_device_that_is_not_there(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        verify_bounds.main(["--device", "cuda:99"])
    assert error.value.code == 2
    assert "--device cuda:99 cannot be used here" in capsys.readouterr().err


def test_a_dtype_that_cannot_be_enumerated(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        verify_bounds.main(["--dtype", "float64"])
    assert error.value.code == 2
    assert "invalid choice: 'float64'" in capsys.readouterr().err


def test_a_long_row_of_logits_is_shortened() -> None:
    assert verify_bounds.describe_argmax((0.0, -1.0, 2.5, 3.0)) == "0, -1, 2.5, …"
    assert verify_bounds.describe_argmax(1e-16) == "1e-16"
