"""What `attach` and a probe refuse, and what they say then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import probes
from probes.sinks import CsvSink, JsonLinesSink, MemorySink, TensorBoardSink
from stability.divergence import NonFiniteDetector
from tests.probes.lifecycle import assert_nothing_is_left, linear, one_step


class TestBadInput:
    def test_a_model_that_is_none(self) -> None:
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; got str"):
            probes.attach("model")

    def test_a_model_without_parameters(self) -> None:
        with pytest.raises(ValueError, match="must have parameters to watch; ReLU has none"):
            probes.attach(nn.ReLU())

    def test_a_filter_that_matches_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"blocks\.\*.*matches none.*The first are: \(root\), 0"):
            probes.attach(nn.Sequential(nn.Linear(1, 1)), layers="blocks.*", log_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_filter_of_numbers(self) -> None:
        with pytest.raises(TypeError, match="pattern"):
            probes.attach(nn.Linear(1, 1), layers=[3])

    def test_a_filter_that_is_a_number(self) -> None:
        with pytest.raises(TypeError, match="`layers` must be a pattern or a sequence of patterns.*got 3"):
            probes.attach(nn.Linear(1, 1), layers=3)

    @pytest.mark.parametrize(
        ("patterns", "idle"), [(["0", "blok.*"], r"'blok\.\*'"), (["x", "y", "0"], "'x', 'y'"), ([], r"\[\]")]
    )
    def test_one_filter_of_several_that_matches_nothing(self, patterns: list[str], idle: str) -> None:
        with pytest.raises(ValueError, match=rf"; {idle} matches none of the model's 2\. The first are"):
            probes.attach(nn.Sequential(nn.Linear(1, 1)), layers=patterns)

    def test_what_is_no_directory(self) -> None:
        with pytest.raises(TypeError, match="`log_dir` must be a path or None; got 3"):
            probes.attach(nn.Linear(1, 1), log_dir=3)
        with pytest.raises(ValueError, match="`log_dir` must name a directory; got an empty path"):
            probes.attach(nn.Linear(1, 1), log_dir="")

    def test_a_same_step_that_is_neither_true_nor_false(self) -> None:
        model, optimizer = linear()
        with pytest.raises(TypeError, match="`same_step` must be True or False; got 'no'"):
            probes.attach(model, optimizer, same_step="no")

    def test_attaching_twice(self) -> None:
        model = nn.Linear(1, 1)
        with probes.attach(model), pytest.raises(ValueError, match="watched already; close its probe"):
            probes.attach(model)
        probes.attach(model).close()  # after closing it may be watched again

    def test_a_file_of_another_probe(self, tmp_path: Path) -> None:
        lines, table, events = (
            JsonLinesSink(tmp_path / "run.jsonl"),
            CsvSink(tmp_path / "run.csv"),
            TensorBoardSink(tmp_path),
        )
        with pytest.raises(TypeError, match="`layers` must be"):  # a refused call takes nothing
            probes.attach(nn.Linear(1, 1), sinks=[lines], layers=3)
        with probes.attach(nn.Linear(1, 1), sinks=[lines, table, events]):
            for sink in (lines, table, events):
                with pytest.raises(
                    ValueError, match=rf"a {type(sink).__name__} twice, or one that another op"
                ):
                    probes.attach(nn.Linear(1, 1), sinks=[MemorySink(), sink])
        twice = JsonLinesSink(tmp_path / "twice.jsonl")
        with pytest.raises(ValueError, match="twice, or"):
            probes.attach(nn.Linear(1, 1), sinks=[twice, twice])

    def test_memory_may_be_shared(self) -> None:
        memory = MemorySink()
        for _ in range(2):
            with (
                probes.attach(nn.Linear(1, 1), sinks=[memory]) as probe,
                probes.attach(nn.Linear(1, 1), sinks=[memory]),
            ):
                probe.log(loss=1.0)
                probe.step()
        assert [record.value for record in memory if record.quantity == "loss"] == [1.0, 1.0]

    def test_a_compiled_model(self) -> None:
        with pytest.raises(ValueError, match=r"`model` is compiled.*attach to the model first"):
            probes.attach(torch.compile(nn.Linear(1, 1)))
        with pytest.raises(ValueError, match=r"`1` in `model` is compiled"):
            probes.attach(nn.Sequential(nn.Linear(1, 1), torch.compile(nn.Linear(1, 1))))

    def test_an_optimizer_of_another_model(self) -> None:
        with pytest.raises(ValueError, match="this SGD holds none of Linear's"):
            probes.attach(nn.Linear(1, 1), linear()[1])

    def test_an_optimizer_that_is_none(self) -> None:
        with pytest.raises(TypeError, match="`optimizer` must be"):
            probes.attach(nn.Linear(1, 1), "adam")

    @pytest.mark.parametrize("name", ["every", "attention_every", "layer_jacobian_every"])
    def test_a_negative_interval(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"`{name}` must be at least 0; got -1"):
            probes.attach(nn.Linear(1, 1), **{name: -1})

    def test_no_attention_rows(self) -> None:
        with pytest.raises(ValueError, match="`attention_rows` must be at least 1; got 0"):
            probes.attach(nn.Linear(1, 1), attention_rows=0)

    def test_a_fractional_interval(self) -> None:
        with pytest.raises(TypeError, match="`every` must be an integer; got 0.5"):
            probes.attach(nn.Linear(1, 1), every=0.5)

    def test_an_unknown_action(self) -> None:
        with pytest.raises(ValueError, match="`on_divergence` must be one of"):
            probes.attach(nn.Linear(1, 1), on_divergence="panic")

    @pytest.mark.parametrize(
        ("name", "given", "got"),
        [
            ("sinks", MemorySink(), "got MemorySink"),
            ("sinks", [MemorySink], "got the class MemorySink itself"),
            ("sinks", [Path("run.jsonl")], "one of them is "),
            ("detectors", NonFiniteDetector(), "got NonFiniteDetector"),
            ("detectors", [NonFiniteDetector], "got the class NonFiniteDetector itself"),
            ("detectors", "all", "got str"),
        ],
    )
    def test_what_is_no_list_of_sinks_or_detectors(self, name: str, given: object, got: str) -> None:
        with pytest.raises(TypeError, match=f"`{name}` must be a list of objects with .*{got}"):
            probes.attach(nn.Linear(1, 1), **{name: given})

    def test_an_unwritable_log_dir(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        model, optimizer = linear()
        with pytest.raises(OSError, match="Choose a writable log_dir"):
            probes.attach(model, optimizer, log_dir=tmp_path / "file" / "run")
        assert_nothing_is_left(model, optimizer)

    def test_attention_asked_for_where_there_is_none(self) -> None:
        model, optimizer = linear()
        with probes.attach(model, optimizer, attention_every=5):
            model(torch.ones(1, 2)).sum().backward()
            before = model.weight.clone()
            with pytest.raises(ValueError, match="the model made no attention call"):
                optimizer.step()
            assert torch.equal(model.weight, before)

    def test_a_model_without_attention_is_fine_by_default(self) -> None:
        model, optimizer = linear()
        with probes.attach(model, optimizer) as probe:
            one_step(model, optimizer, torch.ones(1, 2))
        assert probe.attention_sites == []

    def test_stepping_and_logging_after_close(self) -> None:
        probe = probes.attach(nn.Linear(1, 1))
        probe.close()
        probe.close()
        with pytest.raises(RuntimeError, match=r"probe\.step\(\) after close"):
            probe.step()
        with pytest.raises(RuntimeError, match=r"probe\.log\(\) after close"):
            probe.log(loss=1.0)

    def test_stepping_by_hand_beside_an_optimizer(self) -> None:
        model, optimizer = linear()
        with probes.attach(model, optimizer) as probe, pytest.raises(RuntimeError, match="Remove the call"):
            probe.step()

    def test_never_stepping_without_an_optimizer_is_said_once(self) -> None:
        model = nn.Linear(2, 1)
        with pytest.warns(probes.ProbeWarning, match=r"probe\.step\(\) was never called") as caught:
            with probes.attach(model):
                for _ in range(2):
                    model(torch.ones(1, 2)).sum().backward()
        assert [warning.filename for warning in caught] == [__file__]

    @pytest.mark.filterwarnings("error::probes.ProbeWarning")
    def test_nothing_is_said_of_a_step_that_is_cut_short(self) -> None:
        model = nn.Linear(2, 1)
        with probes.attach(model) as probe:
            probe.step()
            model(torch.ones(1, 2))
        probes.attach(model).close()
        with pytest.raises(KeyboardInterrupt), probes.attach(model):
            model(torch.ones(1, 2))
            raise KeyboardInterrupt

    def test_logging_what_is_no_number(self) -> None:
        with probes.attach(nn.Linear(1, 1)) as probe:
            with pytest.raises(ValueError, match="`loss` must have one real element; got shape \\(3,\\)"):
                probe.log(loss=torch.ones(3))
            with pytest.raises(TypeError, match="`loss` must be a number or a tensor; got str"):
                probe.log(loss="low")
            with pytest.raises(ValueError, match="`grad_norm` is a name of the probe's own"):
                probe.log(grad_norm=1.0)

    def test_loading_the_state_of_other_detectors(self) -> None:
        with probes.attach(nn.Linear(1, 1)) as probe, probes.attach(nn.Linear(1, 1), detectors=[]) as other:
            with pytest.raises(ValueError, match="Attach with the same ones"):
                other.load_state_dict(probe.state_dict())
