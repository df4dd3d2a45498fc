"""The pages, and an inspection in a terminal: safe, whole, and saying what they should."""

import json
import math
import re

import pytest
from torch import nn

from phi3_plugin.data.findings import BROKEN, UNUSABLE
from phi3_plugin.errors import OutputError
from phi3_plugin.inspect import Cut, StockSteps, Unit, advice
from phi3_plugin.pages import inspection as shown
from phi3_plugin.pages import render, write_files
from phi3_plugin.pages.charts import NOISY, Curve, chart, picture
from phi3_plugin.pages.numbers import count, number, percent, rounded
from phi3_plugin.pages.report import Ending, running_mean, series, write_report
from phi3_plugin.redaction import redacted
from phi3_plugin.train.resume import told
from tests.inspected import Page, check_fetches_nothing, findings, numbers, sample

MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}{% if %}"
EVIL = f"{MARKUP}\x1b[2J\u202e\ud800"
SPELLED = f"{MARKUP}\\x1b[2J\\u202e\\ud800"


def test_shares_do_not_look_like_nothing_or_all():
    shares = (0, 0.0001, 0.0005, 0.0994, 0.0996, 0.5, 0.994, 0.996, 0.9999, 1)
    written = ["0", "<0.1", "0.1", "9.9", "10", "50", "99", "99.6", ">99.9", "100"]
    assert [percent(share) for share in shares] == [f"{text} %" for text in written]


def test_counts():
    assert count(1, "row") == "1 row" and count(2000, "row") == "2,000 rows"


def test_numbers_have_a_fixed_precision_and_a_true_minus():
    assert number(1234567) == "1,234,567" and number(-0.5, 4) == "−0.5000"
    assert number(2, 2, signed=True) == "+2.00" and number(-0.001, 2, signed=True) == "+0.00"
    assert number(math.nan) == number(math.inf) == "–" and number(-3.2e15) == "−3.20e+15"


def test_numbers_of_all_sizes_are_rounded():
    values = (0, 3.0844, 0.96940001, 12345.6, 0.0001, 6.1234e-5, -2.5, 1e15, math.nan)
    assert [rounded(value) for value in values] == [
        *("0", "3.084", "0.9694", "12,346", "0.0001", "6.12e−05", "−2.5", "1.00e+15", "–")
    ]


# Every page


@pytest.fixture(scope="module")
def shell():
    return render("shell.html.j2", tiles=[])


def colors(css):
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", css))


def contrast(*pair):
    """Return the contrast of two colors; WCAG 2.2, relative luminance."""
    lights = []
    for color in pair:
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


TEXTS = {
    "ink": ("back", "card", "read", "token", "token-2"),
    "soft": ("back", "card", "read"),
    "purple": ("card", "read", "token", "token-2"),
    "sign": ("token", "token-2"),
    "blue": ("card",),
    "stop-ink": ("stop",),
    "warn-ink": ("warn", "card"),
    "good-ink": ("good",),
}
"""Colors of texts, and those that they stand on."""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_has_contrast(shell, dark):
    light, _, rest = shell.partition("@media screen and (prefers-color-scheme: dark)")
    known = colors(light)
    if dark:
        known |= colors(rest.partition("} }")[0])
    for text, backs in TEXTS.items():
        for back in backs:
            assert contrast(known[text], known[back]) >= 4.5, (text, back)
    for drawn in ("blue", "orange", "green", "red"):  # WCAG 1.4.11
        assert contrast(known[drawn], known["card"]) >= 3, drawn


def test_paper_is_white_and_breaks_between_rows(shell):
    printed = shell.partition("@media print")[2]
    assert "prefers-color-scheme: dark" not in shell.replace("@media screen and (prefers", "")
    rules = dict(re.findall(r"^  ([^{]+?) { ([^}]+) }", printed, re.MULTILINE))
    assert "break-after: avoid" in rules["h1, h2, h3, summary, .note"]
    (whole,) = [names.split(", ") for names, rule in rules.items() if "inside: avoid" in rule]
    assert "tr" in whole and ".card" not in whole  # a table may be longer than a page
    assert "table-header-group" in rules["thead"]


@pytest.mark.parametrize("tiles", range(1, 13))
def test_rows_of_tiles_are_about_equally_full(tiles):
    page = render("shell.html.j2", tiles=[("a", "1")] * tiles)
    columns = int(re.search(r'style="--columns: (\d+)', page)[1])
    rows = math.ceil(tiles / columns)
    assert columns <= 5 and rows == math.ceil(tiles / 5)
    assert "flex: 1 1" in page  # so that the tiles of the last row fill it


def test_files_are_written_whole_and_all_or_none(tmp_path):
    folder = tmp_path / "new" / "folder"
    write_files(folder, {"a.html": "😀\ud800", "b.png": b"\x89"}, "Do this.")
    assert (folder / "a.html").read_text("utf-8") == "😀?"
    (folder / "b.png").unlink()
    (folder / "b.png").mkdir()  # so that it cannot be replaced
    with pytest.raises(OutputError, match=r"b\.png could not be written.* Do this\."):
        write_files(folder, {"b.png": b"new", "a.html": "new"}, "Do this.")
    assert (folder / "a.html").read_text("utf-8") == "😀?"
    assert {file.name for file in folder.iterdir()} == {"a.html", "b.png"}
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"a\.html|file"):
        write_files(tmp_path / "file", {"a.html": ""}, "Do this.")


# The page of an inspection


def page(*samples, **changes):
    return Page(shown.page_of(numbers(**changes), samples))


def test_what_a_reader_of_an_inspection_finds():
    found = page(sample((" Hi", False), ("\n\tYes", True)))
    for said in (
        "chats.jsonl",
        "No problem was found.",
        "Tokens an epoch 4,100",
        "Median 25, 95 % have up to 200, longest 200. Samples are cut at 256.",
        "plain yours 10 % 25",
        "packed 1.0 % 5",
        "256 yours 0 % 0 %",
        "chats.jsonl:1: 2 tokens, 1 trained",
        "·Hi⏎ ⇥Yes",
    ):
        assert said in found.words, said
    assert ("span", "title", "id 1, trained") in found.attributes
    assert ("span", "class", "u trained") in found.attributes
    check_fetches_nothing(found)


def test_problems_come_first():
    found = page(findings=findings((BROKEN, "chats.jsonl:4", "broken JSON")))
    (problem,) = advice(numbers(findings=findings((BROKEN, "", ""))))
    assert found.words.index(problem.text) < found.words.index("Tokens an epoch")
    assert "chats.jsonl:4: broken JSON" in found.words


def test_nothing_of_the_data_becomes_markup():
    noticed = findings((UNUSABLE, EVIL, EVIL))
    options = {"_component_": EVIL}
    found = page(sample((EVIL, True), where=EVIL), findings=noticed, options=options)
    plain = findings((UNUSABLE, "b", "c"))
    tags = page(sample(("a", True)), findings=plain, options={"_component_": "x"}).tags
    assert set(found.tags) <= {*tags, "i"}
    # Twice as the title, as a place, as what is said of it, and as where the sample stands
    assert found.words.count(SPELLED) == 5 and SPELLED.replace(" ", "·") in found.words
    check_fetches_nothing(found)


def test_a_character_of_several_tokens_names_all_ids():
    one = sample(("a", True))
    one.units[0] = Unit("😀", (243, 162, 155, 131), True, False)
    assert ("span", "title", "ids 243, 162, 155, 131, trained") in page(one).attributes


THINKING = sample(("Hi", False), ("<think>a", True), ("</think>", True), ("Yes", True))
THINKING.units[1:3] = [unit._replace(thought=True) for unit in THINKING.units[1:3]]


def test_a_thought_is_shown_apart():
    found = page(THINKING)
    assert "4 tokens, 3 trained, of these 2 a thought" in found.words
    assert ("span", "class", "u trained thought") in found.attributes
    assert ("span", "title", "id 1, trained, thought") in found.attributes
    text = report(THINKING)
    assert "\n| Hi\n~ <think>a</think>\n+ Yes\n" in text and "~ trained, a thought" in text
    assert "a thought" not in report(sample(("Yes", True))) + page(sample(("Yes", True))).words


def test_a_cut_sample_and_a_long_one():
    assert "✂ 7 tokens cut here, not seen" in page(sample(("a", True), lost=7)).words
    many = sample(*((f"<{n}>", True) for n in range(shown.HEAD_UNITS + shown.TAIL_UNITS + 30)))
    found = page(many)
    assert f"<{shown.HEAD_UNITS - 1}>… 30 more …<{shown.HEAD_UNITS + 30}>" in found.words


def test_samples_that_are_dropped():
    assert "Orange" not in page().words
    cuts = [Cut(100, 0.5, 0.31, "yours", True)]
    found = page(limit=100, cuts=cuts, truncate="drop")
    assert ("tr", "class", "over") in found.attributes
    assert "Samples of more than 100 are dropped. Orange bars are longer." in found.words
    assert "If samples are dropped above samples dropped tokens lost" in found.words
    assert "100 yours 50 % ≥ 31 %" in found.words and "cut" not in found.words


def test_padding_is_shown_where_the_recipe_pads():
    assert "Padding 10 %" in page().words and "padding steps an epoch" in page().words
    ours = page(padded=False).words
    assert "adding" not in ours and "Batches steps an epoch plain yours 25 packed 5" in ours
    both = page(padded=False, stock=StockSteps(72, 24, 3)).words
    assert "Padding" not in both and "Batches; only torchtune's recipes pad" in both
    assert "by torchtune's recipes 72 steps, 24 an epoch, without the last 3 of each" in both


def test_no_sample_and_no_limit():
    assert "The first samples" not in page(limit=None).words


# An inspection in a terminal

DRIVER = "\x1b]0;title\x07\x1b[2J\r\u202e中文" * 20


def report(*samples, width=80, color=False, **changes):
    terminal = shown.Terminal(width, color=color)
    return terminal.report(numbers(**changes), samples, "out/data.html")


def uncolored(text):
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_the_whole_report():
    text = report(sample(("<|user|>", False), (" Hi", False), (" Yes", True), ("<|end|>", True)))
    lines = text.splitlines()
    assert lines[0] == "Training data: chats.jsonl" and lines[-1] == "All of it: out/data.html"
    for said in (
        "No problem was found.",
        "Rows                    100 read",
        "Tokens an epoch         4,100",
        "Trained on              2,050 (50 %)",
        "Training                75 steps of 4 samples, 25 an epoch",
        "  Median 25, 95 % have up to 200, longest 200. Samples are cut at 256.",
        "> plain (yours)                         10 %              25",
        "  packed                               1.0 %               5",
        "> 256 (yours)                            0 %             0 %",
        "1. chats.jsonl:1: 4 tokens, 2 trained",
        "| <|user|>·Hi",
        "+ ·Yes<|end|>",
    ):
        assert said in lines, said


def test_colors_change_nothing_but_colors():
    units = ("<|user|>", False), (" a\nb", False), (" c", True), ("<|end|>", True), ("", False)
    plain, colored = (report(sample(*units, lost=5), color=color) for color in (False, True))
    assert "\x1b" not in plain and colored != plain == uncolored(colored)


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("color", [False, True])
def test_it_fits_and_data_cannot_drive_the_terminal(width, color):
    noticed = findings((UNUSABLE, f"{DRIVER}:1", DRIVER), (UNUSABLE, "b" * 200, "c " * 200))
    units = [(DRIVER, True), ("word" * 60, False), (" a", True), ("中" * 50, True)]
    one = sample(*units, where=DRIVER, lost=12345)
    text = report(one, width=width, color=color, findings=noticed)
    for line in text.splitlines():
        assert shown.columns(line) <= width, line
    rest = uncolored(text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", rest)
    assert "\\x1b]0;title\\x07" in rest


def test_a_line_is_trained_on_as_a_whole_or_not_at_all():
    lines = report(sample(("<|user|>", False), (" a\n\nb", True), (" c", False))).splitlines()
    start = lines.index("| <|user|>")
    assert lines[start : start + 5] == ["| <|user|>", "+ ·a⏎", "+ ⏎", "+ b", "| ·c"]


def test_the_border_of_a_cut_sample():
    lines = report(sample(("a", True), lost=1200)).splitlines()
    assert lines[-3:-1] == ["✂ 1,200 tokens cut here, not seen", ""]
    one = sample(("a", True), lost=1)._replace(from_start=True)
    lines = report(one).splitlines()
    assert lines[lines.index("✂ 1 token cut before the last turns, not seen") + 1] == "+ a"


def test_samples_that_are_dropped_in_a_terminal():
    cuts = [Cut(100, 0.5, 0.31, "yours"), Cut(150, 0.1, 0.05, "", least=True)]
    lines = report(limit=100, cuts=cuts, truncate="drop").splitlines()
    assert "If samples are dropped above" in lines
    assert any(line.endswith("█ dropped") for line in lines)
    assert max(map(shown.columns, lines)) <= 80
    assert ["150", "10", "%", "≥", "5.0", "%"] in map(str.split, lines)


def test_a_long_sample_is_shortened_in_the_middle():
    lines = report(sample(*((f"line {n}\n", True) for n in range(100)))).splitlines()
    assert "+ line·0⏎" in lines and "+ line·99⏎" in lines and "+ line·50⏎" not in lines
    assert "  … 88 more lines in the page" in lines


def test_white_space_and_columns():
    assert shown.seen(" a\tb\n\r") == "·a⇥b⏎\\x0d"
    assert [shown.columns(text) for text in ("ab", "中文", "e\u0301", "\x1b[31mab\x1b[0m")] == [
        *(2, 4, 1, 2)
    ]


# The report of a run

CONFIG = {
    "seed": 3,
    "dataset": {
        "_component_": "phi3_plugin.data.chat_dataset",
        "source": "data/train.jsonl",
        "packed": True,
    },
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-4, "betas": [0.9, 0.999]},
    "lr_scheduler": {"_component_": "phi3_plugin.train.cosine_with_warmup"},
    "shuffle": True,
    "steps": [{"at": 1}, {"at": 2}],
    "hf_token": "s3cret",
    "logger": {"api_key": "s3cret"},
    "tokenizer": {"path": "p", "splits": ["a", "b"]},
}


class Adapted(nn.Linear):
    """A module with an adapter."""

    def __init__(self):
        super().__init__(3, 5, bias=False)
        self.weight.requires_grad_(False)
        self.lora_a = nn.Linear(3, 2, bias=False)


def run_report(folder, lines, *, config=CONFIG, **changes):
    """Write the report of a run that logged these lines."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    layers = [nn.ModuleDict({"attn": Adapted()}) for _ in range(2)]
    facts = {
        "model": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
        "settings": redacted(config),
        "changes": {},
        "adapter": folder / "final",
        "base": "Phi-3-mini-4k-instruct",
        "outcome": Ending(108, 108, None, "2026-11-30"),
        "samples": 1700,
        "held_out": 90,
        "answers": [("2 < 3?", "No.", "Yes.\nIndeed.")],
        "next_commands": [("talk to it", "phi3-tune chat --adapter run/final")],
        **changes,
    }
    return write_report(folder, **facts)


def read_report(folder, lines, **changes):
    return Page(run_report(folder, lines, **changes).read_text("utf-8"))


def history(steps, validations=True):
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "epoch": step // 100,
                "loss": 1 + 2 / step + 0.1 * math.sin(step),
                "lr": 1e-4,
                "grad_norm": 0.5,
                "tokens": 1000,
                "tokens_per_second": 2000.0,
                "seconds": 0.5,
                "peak_memory_gib": 3.25,
            }
        )
        if validations and step % 10 == 0:
            lines.append({"step": step, "val_loss": 1 + 1 / step, "val_perplexity": 3.0})
    return lines


def test_what_a_reader_of_a_report_finds(tmp_path):
    lines = [*history(100), {"event": "skipped", "step": 5}, {"event": "skipped", "step": 9}]
    lines += [{"event": "overflowed", "step": 7}]
    lines += [{"event": "resumed", "step": 40}, {"step": 60, "answers": ["Perhaps."]}]
    changes = told(
        [
            {"step": 40, "key": "optimizer.lr", "before": 2e-4, "after": 1e-5},
            {"step": 40, "key": "sample_prompts", "before": [], "after": ["Hi"]},
        ]
    )
    page = read_report(tmp_path, lines, changes=changes)
    for expected in (
        "Phi-3-mini-4k-instruct on train.jsonl",
        "2026-11-30, ",
        "Finished: 108 of 108 steps.",
        "Samples 1,700",
        "Held out 90",
        "Best validation loss, step 100 1.0100",
        "Validation perplexity 3.000",
        "talk to it phi3-tune chat --adapter run/final",
        str(tmp_path / "final"),
        "16 settings, 5 of them not the default",
        "dataset.source data/train.jsonl",
        "dataset.packed true default false",
        "optimizer.lr 0.0002; from step 41 on 1e-05 default 0.001",
        "optimizer.betas 0.9, 0.999 ",
        "lr_scheduler._component_ phi3_plugin.train.cosine_with_warmup default null",
        "sample_prompts []; from step 41 on ['Hi'] default []",
        "seed 3 default 0 ",
        "shuffle true steps.0.at 1",
        "steps.1.at 2",
        "tokenizer.path p",
        "tokenizer.splits a, b",
        "hf_token (not shown)",
        "torchtune 0.6.1",
        "python 3.",
        "device ",
        "layers.*.attn × 2",
        "12 of 42 (28.57 %)",
        "Skipped steps 2",
        "Steps skipped for a smaller loss scale 1",
        "Resumed at step 40",
        "Tokens 100,000",
        "Training time 0:00:50",
        "Peak memory 3.25 GiB",
        "2 < 3?",
        "Yes. Indeed.",
        "Step 60 Perhaps.",
    ):
        assert expected in page.words, expected
    assert "s3cret" not in page.words
    assert page.charts == [
        "Training loss: 3.084 at step 1, 0.9694 at step 100. "
        "Validation loss: 1.1 at step 10, 1.01 at step 100.",
        "Learning rate: 0.0001 at step 1, 0.0001 at step 100.",
        "Gradient norm: 0.5 at step 1, 0.5 at step 100.",
        "Tokens per second: 2,000 at step 1, 2,000 at step 100.",
    ]
    assert page.text.count("step") == len(page.charts)  # names the axis of each
    texts = [text for text in page.text if text.startswith("step 60\n")]
    assert texts[0] == "step 60\nTraining loss: 1.0029\nValidation loss: 1.0167"
    assert texts[1] == "step 60\nLearning rate: 0.0001"
    check_fetches_nothing(page)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    names = ["loss.png", "metrics.jsonl", "report.html"]
    assert [file.name for file in sorted(tmp_path.iterdir())] == names


def test_equal_runs_give_equal_files_whatever_a_matplotlibrc_says(tmp_path):
    import matplotlib

    adapter = tmp_path / "final"
    run_report(tmp_path / "first", history(300), adapter=adapter)
    with matplotlib.rc_context({"axes.facecolor": "black", "lines.linewidth": 9}):
        run_report(tmp_path / "second", history(300), adapter=adapter)
    for name in ("report.html", "loss.png"):
        first, second = (tmp_path / run / name for run in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_no_text_of_a_run_becomes_markup(tmp_path):
    evil = f"{EVIL}$\\frac{{$"
    section = {"_component_": "phi3_plugin.data.chat_dataset", "source": evil}
    lines = [*history(20), {"event": evil, "step": 3}, {"step": 4, "loss": evil, "epoch": evil}]
    answers = [(evil, evil, evil)]
    config = {"word": evil, evil.replace(".", ""): [evil], "dataset": section}
    changes = {"base": evil, "next_commands": [(evil, evil)]}
    changes["outcome"] = Ending(20, 30, evil, evil)
    page = read_report(tmp_path, lines, answers=answers, config=config, **changes)
    assert not {"b", "i", "u", "img"} & set(page.tags)
    assert page.words.count(SPELLED) >= 11
    check_fetches_nothing(page)


def test_the_shortest_run(tmp_path):
    page = read_report(tmp_path, history(1, validations=False))
    assert len(page.charts) == 4
    for absent in ("Best validation", "perplexity", "Skipped", "Resumed"):
        assert absent not in page.words


@pytest.mark.parametrize("name", [None, 3, "no.such.Logger", "torchtune", "builtins.dict.fromkeys"])
def test_a_component_that_was_not_needed_may_be_anything(tmp_path, name):
    config = {**CONFIG, "metric_logger": {"_component_": name, "log_dir": "logs"}}
    words = read_report(tmp_path, history(2), config=config).words
    assert "metric_logger.log_dir logs default null" in words


def test_a_run_on_preferences(tmp_path):
    lines = history(20, validations=False)
    for line in lines:
        line |= {"reward_margin": line["step"] / 10, "reward_accuracy": 0.75}
    lines.append(
        {"step": 20, "val_loss": 0.5, "val_reward_margin": 1.5, "val_reward_accuracy": 0.9}
    )
    page = read_report(tmp_path, lines)
    assert "Its reward accuracy 90 %" in page.words and "perplexity" not in page.words
    assert page.charts[1] == (
        "Training: 0.1 at step 1, 2 at step 20. Validation: 1.5 at step 20, 1.5 at step 20."
    )
    assert page.charts[2].startswith("Training: 0.75")


def test_a_run_without_a_step(tmp_path):
    (tmp_path / "loss.png").write_text("that of an earlier report")
    outcome = Ending(0, 9, "nobody wanted it", "2026-11-30")
    page = read_report(tmp_path, [], outcome=outcome, answers=[], next_commands=[])
    assert page.charts == [] and "What to type next" not in page.words
    assert "Stopped after 0 of 9 steps: nobody wanted it." in page.words
    assert "No step was recorded" in page.words
    assert not (tmp_path / "loss.png").exists()


def test_fields_may_be_missing_or_null(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "grad_norm": None}, {"step": 3}]
    lines += [{"step": 4, "val_loss": 1.5}]
    page = read_report(tmp_path, lines, answers=[("Only this", "", "")])
    assert len(page.charts) == 1
    assert "Only this" in page.words and page.words.count("no answer") == 2


def test_spikes(tmp_path):
    lines = history(300)
    lines[40] |= {"loss": 1e9, "grad_norm": -1e9, "tokens_per_second": 0.0}
    assert len(read_report(tmp_path, lines).charts) == 4


def test_a_long_run_makes_a_small_report(tmp_path):
    page = run_report(tmp_path, history(10_000))
    assert page.stat().st_size < 500_000
    assert (tmp_path / "loss.png").stat().st_size < 300_000


def test_a_chart_of_many_steps_shows_its_spikes_and_can_be_read_off():
    points = [(step, 1.0 + (step == 777)) for step in range(1, 10_001)]
    made = chart("Loss", [Curve("Loss", points, NOISY), Curve("Mean", points[9::10])])
    assert made.lines[0].path.count("L") < 1000 and not made.lines[0].marks
    assert " 0L" in made.lines[0].path  # the spike
    assert 100 < len(made.readings) <= 200
    assert made.readings[-1].text == "step 10,000\nLoss: 1\nMean: 1"
    edges = [reading.start for reading in made.readings] + [100]
    widths = [reading.width for reading in made.readings]
    assert edges[0] == 0 and all(width > 0 for width in widths)
    assert sum(widths) == pytest.approx(100, abs=1)


def test_axes_name_round_values_within_the_chart():
    made = chart("Rate", [Curve("Rate", [(1, 0.0), (366, 0.004)])], from_zero=True)
    assert [tick.text for tick in made.xs] == ["100", "200", "300"]
    assert (made.ys[0], made.ys[-1]) == ((0.0, "0.000"), (100.0, "0.004"))
    tiny = chart("Rate", [Curve("Rate", [(1, 0.0), (2, 4e-5)])])
    assert [tick.text for tick in tiny.ys][:2] == ["0", "1e−05"]
    of_one = chart("Rate", [Curve("Rate", [(7, 3.0)])])
    assert of_one.xs == [(50.0, "7")] and of_one.lines[0].marks
    spiked = chart("Loss", [Curve("Loss", [(1, 1.0), (2, 2.0), (3, 1e6)])])
    places = [tick.place for tick in spiked.ys]
    assert spiked.ys[0].text == "1" and places == sorted(places) and len(places) < 12


def test_a_picture_has_a_title(monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda _, text: titles.append(text))
    assert picture("Phi-3 on $rows", [Curve("Loss", [(1, 2.0)])]).startswith(b"\x89PNG")
    assert titles == ["Phi-3 on $rows"]


def test_a_series_has_only_numbers():
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 2, "val_loss": 1.0},
        {"step": 3, "loss": "high"},
        {"step": 4, "loss": math.inf},
        {"step": 5, "loss": 1},
        {"event": "saved", "step": 5},
        {"loss": 9.0},
    ]
    assert series(lines, "loss") == [(1, 2.0), (5, 1.0)]
    assert series(lines, "val_loss") == [(2, 1.0)]
    assert series([], "loss") == []


def test_the_mean_follows_the_last_values():
    points = [(10 * step, float(step)) for step in range(1, 6)]
    assert running_mean(points, 3) == [(10, 1.0), (20, 1.5), (30, 2.0), (40, 3.0), (50, 4.0)]
    assert running_mean([], 3) == []


def test_the_mean_of_a_long_run_forgets_a_spike():
    points = [(step, 1.0) for step in range(100_000)]
    points[500] = (500, 1e18)
    means = running_mean(points, 2000)
    assert len(means) == 500
    assert means[-1] == (99_999, 1.0)
