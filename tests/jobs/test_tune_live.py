import io
from dataclasses import replace

from scarcade.jobs.tune_live import SearchTable
from scarcade.jobs.tune_trial import Trial

ABOUT = {"about": {"n_trials": 2, "epochs": 4, "title": "elbo", "mode": "min"}}
TRIALS = [
    Trial("trial-0000", {"optim.lr": 0.00123456}, "running", 2, [(1, 9.0), (2, 8.0)], seconds=3.2),
    Trial("trial-0001", {"optim.lr": 0.1}, "failed", reason="broken"),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_for_each_trial_that_is_over() -> None:
    stream = io.StringIO()
    with SearchTable(stream=stream) as table:
        table(ABOUT)
        table({"trials": TRIALS})
        table({"warning": "trial-0001 failed: broken"})
        table({"trials": [replace(TRIALS[0], state="stopped"), TRIALS[1]]})
    assert stream.getvalue().splitlines() == [
        "warning: trial-0001 failed: broken",
        "trial-0000: stopped after 2 epochs, elbo 8",
    ]


def test_a_terminal_gets_one_table() -> None:
    stream = Terminal()
    with SearchTable(stream=stream) as table:
        table(ABOUT)
        table({"trials": TRIALS})
        table({"note": "a [sentence]"})
    shown = stream.getvalue()
    for part in ("2 trials: 1 failed, 1 running; best elbo 8 (trial-0000)", "2 of 4", "0.00123", "a [sentence]"):
        assert part in shown
