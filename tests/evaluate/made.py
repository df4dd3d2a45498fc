"""An evaluation without any model, of texts that are written here."""

from phi3_plugin.evaluate import ADAPTER, BASE, Evaluation, Outcome, Said, Sample, Scorer

HOSTILE = '<script>alert("x")</script> & {{ 7 * 7 }} \u202e\x1b[31m</div>'

ROWS = (
    # prompt, reference, base, adapter
    ("2 + 2?", "Two and two.\n#### 4", "It is 5", "It is 4.\n#### 4"),
    ("3 * 4?", "Three fours.\n#### 12", "12", "Three fours.\n#### 12"),
    ("1000 + 234?", "A sum.\n#### 1,234", "$1234.00", "About 1,200"),
    ("Say hi", "hi there", "hello there, friend", HOSTILE),
    ("中文?", "是的", "", "是的"),
)


def made(*, adapter: bool = True, rows=ROWS, times: int = 1) -> Evaluation:
    """Return an evaluation of the rows, each so many times."""
    scorer, samples = Scorer(), []
    outcomes = {name: [] for name in (BASE, ADAPTER)[: 1 + adapter]}
    for i in range(len(rows) * times):
        prompt, reference, *answers = rows[i % len(rows)]
        samples.append(Sample(f"rows.jsonl:{i + 1}", i + 1, prompt, reference))
        for number, (name, text) in enumerate(zip(outcomes, answers, strict=False)):
            said = Said(text, "stop" if text else "length", 3, scorer.score(text, reference))
            loss = (i + 1) * (2.0 - number + 0.01 * i)
            outcomes[name].append(Outcome(loss, (i + 1) * (0.3 + 0.4 * number), i + 1, said))
    return Evaluation(samples, outcomes, {"evaluated": f"{len(samples)} samples of <b>rows</b>."})
