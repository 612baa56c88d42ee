from __future__ import annotations

import json

import pytest
import torch
import typer
from demo_models import TEXTS, save_csv, save_model, tokenizer
from tokenizers import processors
from transformers import T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from elang.calibration import BatchCosts
from elang.commands import bench as command
from elang.dispatch import MODES
from elang.evaluation import bench_report, pair_bench, route_bench
from elang.evaluation.pair_bench import PairBench, Point
from elang.evaluation.route_bench import RouteBench, RoutePoint
from elang.evaluation.timing import ROUNDS

pytestmark = pytest.mark.usefixtures("one_thread")

app = typer.Typer()
app.command()(command.bench)


def point(mode, size, share, efficiency, joint, capacity=None):
    return Point(
        mode=mode,
        batch_size=size,
        share_routed=share,
        swift_seconds=0.1,
        routed_seconds=0.9 * share,
        super_seconds=1.0,
        naive_seconds=0.75,
        joint_seconds=joint,
        dispatch_efficiency=efficiency,
        over_super=1 / joint,
        over_naive=0.75 / joint,
        capacity=capacity,
    )


WHERE = {"device": "cpu (AVX2)", "threads": 1, "dtype": "float32", "rounds": 3}
PAIR = PairBench(
    **WHERE,
    swift="swift",
    super="super",
    data="random tokens",
    rows=35,
    length=128,
    costs=BatchCosts(unit="s", rows=2, swift=0.004, super={1: 0.007, 2: 0.012}),
    points=(
        point("exact", 1, 0.0, 0.98, 0.125),
        point("capacity", 1, 0.0, 0.5, 0.2, capacity=0),
        point("exact", 1, 1.0, 0.97, 1.6),
        point("capacity", 1, 1.0, 0.9, 2.0, capacity=1),
        point("exact", 2, 0.5, 0.96, 0.5),
    ),
)
ROUTE = RouteBench(
    **WHERE,
    backend="cpp",
    points=tuple(
        RoutePoint(hidden=h, classes=c, rows=n, eager_seconds=n * 3e-6, route_seconds=n * 1.5e-6, speedup=2.0)
        for h, c in ((312, 2), (768, 3))
        for n in (1, 8)
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "swift", layers=1)
    save_model(folder / "super", labels=("Good", "BAD"), seed=1)
    save_csv(folder / "rows.csv")
    return folder


@pytest.fixture
def elang(tmp_path):
    def invoke(*options, output=tmp_path / "bench.json"):
        return CliRunner().invoke(app, [*map(str, options), "-o", str(output)], env={"COLUMNS": "120"})

    return invoke


@pytest.fixture
def pair(folder):
    return ("--swift", folder / "swift", "--super", folder / "super")


@pytest.fixture
def called(monkeypatch):
    """What the command asks of the API, which answers at once."""
    calls = {}

    def answer(name, found):
        def call(*arguments, report, **options):
            calls[name] = arguments, options
            return found

        return call

    monkeypatch.setattr(pair_bench, "bench_pair", answer("pair", PAIR))
    monkeypatch.setattr(route_bench, "bench_route", answer("route", ROUTE))
    return calls


def done(result):
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def one_line(result):
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def plain(panel):
    """What typer's frame says, in one line."""
    return " ".join(panel.replace("│", " ").split())


# ---- a pair


def test_a_pair_is_measured_saved_and_shown(elang, pair, folder, tmp_path):
    small = ("--batch-size", "1,2", "--rows", "4", "--length", "5", "--share", "0,.5", "--rounds", "1")
    result = done(elang(*pair, *small, output=tmp_path / "new" / "bench.json"))
    found = PairBench.load(tmp_path / "new" / "bench.json")
    assert (found.swift, found.super) == (str(folder / "swift"), str(folder / "super"))
    assert (found.rows, found.length, found.rounds) == (4, 5, 1)
    assert list(found.costs.super) == [1, 2]
    expected = [(size, share, mode) for size in (1, 2) for share in (0, 0.5) for mode in MODES]
    assert [(p.batch_size, p.share_routed, p.mode) for p in found.points] == expected
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [[str(size), f"{100 * share:.1f}", mode] for size, share, mode in expected] == [
        line[:3] for line in lines if len(line) > 2 and line[2] in MODES
    ]
    assert f"Written: {tmp_path / 'new' / 'bench.json'}" in plain(result.stdout)


def test_json_is_the_file_and_nothing_else(elang, pair, called, tmp_path):
    result = done(elang(*pair, "--json"))
    assert PairBench.model_validate_json(result.stdout) == PairBench.load(tmp_path / "bench.json") == PAIR
    result = done(elang("--json"))
    assert RouteBench.model_validate_json(result.stdout) == RouteBench.load(tmp_path / "bench.json") == ROUTE


def test_every_option_of_a_pair_is_taken(elang, pair, called):
    options = ("--batch-size", "2, 3", "--share", ".25,1", "--dispatch", "capacity,exact", "--rounds", "2")
    done(elang(*pair, *options, "--threads", "3", "--rows", "9", "--length", "16", "--ragged"))
    (swift, super_, inputs), asked = called["pair"]
    assert (swift.config.num_hidden_layers, super_.config.num_hidden_layers) == (1, 2)
    assert asked == {
        "batch_sizes": (2, 3),
        "shares": (0.25, 1.0),
        "dispatch": ("capacity", "exact"),
        "rounds": 2,
        "threads": 3,
        "data": "random tokens, ragged",
    }
    expected = pair_bench.random_rows(swift, super_, 9, length=16, ragged=True)
    assert all(torch.equal(inputs[name], value) for name, value in expected.items())


def test_what_is_not_given_is_left_to_the_api(elang, pair, called):
    done(elang(*pair))
    (_, _, inputs), asked = called["pair"]
    assert asked == {"rounds": ROUNDS, "threads": None, "data": "random tokens"}
    assert inputs["input_ids"].shape == (32, 128)
    done(elang(*pair, "--batch-size", "40,2"))
    assert called["pair"][0][2]["input_ids"].shape == (40, 128)
    done(elang())
    assert called["route"] == ((), {"rounds": ROUNDS, "threads": None, "device": "cpu"})


def test_rows_of_a_file_are_read_in_place_of_random_ones(elang, pair, called, folder):
    done(elang(*pair, "--csv", folder / "rows.csv", "--length", "5"))
    (_, _, inputs), asked = called["pair"]
    expected = tokenizer()(TEXTS[:32], padding=True, truncation=True, max_length=5, return_tensors="pt")
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], value) for name, value in expected.items())
    assert asked["data"] == "rows.csv"
    done(elang(*pair, "--csv", folder / "rows.csv", "--rows", "7"))
    assert len(called["pair"][0][2]["input_ids"]) == 7


def test_a_tokenizer_that_pads_before_the_text_is_made_to_pad_behind_it(elang, folder, called, tmp_path):
    for name in ("swift", "super"):
        save_model(tmp_path / name)
        file = tmp_path / name / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "padding_side": "left"}), "utf-8")
    done(elang("--swift", tmp_path / "swift", "--super", tmp_path / "super", "--csv", folder / "rows.csv"))
    assert called["pair"][0][2]["attention_mask"][:, 0].all()


def test_the_tables_say_what_the_file_says(elang, pair, called):
    lines = [line.split() for line in done(elang(*pair)).stdout.splitlines()]
    # 35 rows: 34 of them in batches of 2.
    for expected in (
        ["1", "0.0", "exact", "3.571", "0.98", "8.00", "6.00"],
        ["1", "0.0", "capacity", "0", "5.714", "0.50", "5.00", "3.75"],
        ["1", "100.0", "exact", "45.714", "0.97", "0.62", "0.47"],
        ["2", "50.0", "exact", "14.706", "0.96", "2.00", "1.50"],
        ["1", "7.000", "7.000"],
        ["2", "12.000", "6.000", "4.000", "2.000"],
    ):
        assert expected in lines
    said = plain(done(elang(*pair)).stdout)
    assert "Medians of 3 rounds in alternation, models eager; cpu (AVX2), 1 thread, float32" in said


def test_the_plot_is_of_speed_ups_beside_the_ideal_ones(elang, pair, called, tmp_path):
    file = tmp_path / "figures" / "bench.png"
    result = done(elang(*pair, "--plot", file))
    assert file.read_bytes().startswith(b"\x89PNG")
    assert str(file) in plain(result.stdout).replace(" ", "")
    (axes,) = bench_report.plot_pair(PAIR).axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn["batch 1: ideal"] == ([0, 1], pytest.approx([1 / 0.1, 1 / (0.1 + 0.9)]))
    assert drawn["batch 1: exact"] == ([0, 1], pytest.approx([8, 0.625]))
    assert drawn["batch 1: capacity"] == ([0, 1], pytest.approx([5, 0.5]))
    assert drawn["batch 2: ideal"] == ([0.5], pytest.approx([1 / (0.1 + 0.45)]))
    assert drawn["batch 2: exact"] == ([0.5], [2])


# ---- the op alone


def test_the_op_alone_is_measured_saved_and_shown(elang, tmp_path):
    result = done(elang("--head", "16x2,8x3", "--batch-size", "1,4", "--rounds", "1"))
    found = RouteBench.load(tmp_path / "bench.json")
    assert [(p.hidden, p.classes, p.rows) for p in found.points] == [(16, 2, 1), (16, 2, 4), (8, 3, 1), (8, 3, 4)]
    assert f"served by {found.backend}" in plain(result.stdout)


def test_every_option_of_the_op_is_taken(elang, called):
    result = done(elang("--head", "16x2, 8x3", "--batch-size", "4", "--rounds", "2", "--threads", "3"))
    expected = {"heads": ((16, 2), (8, 3)), "rows": (4,), "rounds": 2, "threads": 3, "device": "cpu"}
    assert called["route"] == ((), expected)
    lines = [plain(line) for line in result.stdout.splitlines()]
    assert "312 x 2 1.5 us, 2.00x 12.0 us, 2.00x" in lines
    assert "768 x 3 1.5 us, 2.00x 12.0 us, 2.00x" in lines


# ---- wrong usage, and what cannot be done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--swift", "x"), "--swift, --super: got one of them, wanted both, or none for the op alone"),
        (("--super", "x"), "--swift, --super: got one of them"),
        (("--length", "8", "--plot", "p.png"), "--length, --plot: got without --swift and --super"),
        (("--ragged",), "--ragged: got without --swift and --super, wanted with a pair only"),
        (("--rows", "8", "--share", "0", "--dispatch", "exact"), "--rows, --share, --dispatch: got without"),
        (("--csv", __file__), "--csv: got without --swift and --super"),
        (("--swift", "x", "--super", "x", "--head", "8x2"), "--head: got beside --swift and --super"),
        (("--swift", "x", "--super", "x", "--csv", __file__, "--ragged"), "--ragged: got beside --csv"),
        (("--share", "0,1.2"), "got 1.2, wanted a share in [0, 1]"),
        (("--share", "-0.1"), "got -0.1, wanted a share in [0, 1]"),
        (("--share", ""), "got '', wanted a number"),
        (("--dispatch", "exact,graph"), "got 'graph', wanted some of exact, bucket, capacity"),
        (("--batch-size", "1,0"), "got '0', wanted rows of a batch, >= 1"),
        (("--batch-size", "8,"), "got '', wanted rows of a batch, >= 1"),
        (("--head", "768"), "got '768', wanted HxC such as 768x3"),
        (("--head", "768x1"), "got '768x1', wanted HxC"),
        (("--head", "0x2"), "got '0x2', wanted HxC"),
        (("--rounds", "0"), "--rounds"),
        (("--threads", "0"), "--threads"),
        (("--device", "tpu"), "--device: got 'tpu', wanted one of cpu, cuda"),
    ],
)
def test_wrong_usage(elang, called, tmp_path, options, message):
    result = elang(*options)
    assert result.exit_code == 2, result.output
    assert message in plain(result.stderr)
    assert not called
    assert not (tmp_path / "bench.json").exists()


def test_a_folder_without_a_model_is_one_line(elang, folder, tmp_path):
    for role, options in (
        ("swift", ("--swift", tmp_path, "--super", folder / "super")),
        ("super", ("--swift", folder / "swift", "--super", tmp_path)),
    ):
        assert one_line(elang(*options)).startswith(f"elang bench: {role}: got {tmp_path}, wanted the folder or hub id")
    assert not (tmp_path / "bench.json").exists()


def test_labels_that_do_not_match_are_one_line(elang, folder, tmp_path):
    save_model(tmp_path / "other", labels=("yes", "no"))
    message = one_line(elang("--swift", tmp_path / "other", "--super", folder / "super"))
    assert message == "elang bench: swift: got a model with the labels yes, no, wanted good, bad as in super\n"


def test_a_model_that_is_no_classifier_is_one_line(elang, folder, tmp_path):
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    message = one_line(elang("--swift", tmp_path / "t5", "--super", folder / "super"))
    assert message == "elang bench: swift: got T5ForConditionalGeneration, wanted a sequence classifier\n"


def test_models_with_two_tokenizers_have_no_rows_in_common(elang, folder, tmp_path):
    save_model(tmp_path / "other")
    other = tokenizer()
    other.backend_tokenizer.post_processor = processors.TemplateProcessing("$A [UNK]", special_tokens=[("[UNK]", 1)])
    other.save_pretrained(tmp_path / "other")
    message = one_line(elang("--swift", tmp_path / "other", "--super", folder / "super", "--csv", folder / "rows.csv"))
    assert "swift, super: got models that read different tokens, wanted a pair with one tokenizer" in message


def test_what_cannot_be_done_is_one_line(elang, pair, folder, tmp_path):
    assert "--length: got 600, wanted at most 512, the longest input of swift" in one_line(
        elang(*pair, "--length", "600")
    )
    assert "inputs: got 8 rows, wanted at least 32" in one_line(elang(*pair, "--rows", "8"))
    of_file = ("--csv", folder / "rows.csv")
    assert "--rows: got 1000, wanted at most 80" in one_line(elang(*pair, *of_file, "--rows", "1000"))
    assert "inputs: got 80 rows, wanted at least 100" in one_line(elang(*pair, *of_file, "--batch-size", "100"))
    (tmp_path / "rows.csv").write_text("sentence\nfine\n", "utf-8")
    assert "rows.csv" in one_line(elang(*pair, "--csv", tmp_path / "rows.csv"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_one_line(elang):
    assert "--device: got cuda, wanted cpu" in one_line(elang("--device", "cuda"))


def test_help_has_an_example_and_the_defaults(elang):
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    said = plain(done(result).output)
    example = next(line for line in result.output.splitlines() if "Example: elang bench" in line)
    assert all(option in result.output.replace(example, "") for option in example.split() if option.startswith("-"))
    defaults = (pair_bench.BATCH_SIZES, route_bench.ROWS, [f"{h}x{c}" for h, c in route_bench.HEADS])
    for values in (*defaults, [f"{share:g}".removeprefix("0") or "0" for share in pair_bench.SHARES]):
        assert ",".join(map(str, values)) in said
    assert all(f"{value}" in said for value in (pair_bench.ROWS, pair_bench.LENGTH, *MODES))
