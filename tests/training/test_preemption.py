"""SIGTERM on one process: what it does before training, in it, and the second time."""


def test_before_the_first_step_sigterm_ends_the_process_though_it_is_busy(commands):
    code, output = commands.outcome("tests.training.ending", "before_the_first_step")
    assert code == 75, output
    assert "SIGTERM before the first step" in output


def test_the_first_sigterm_in_training_asks_to_stop_and_the_second_ends_the_process(commands):
    code, output = commands.outcome("tests.training.ending", "again_in_the_last_save")
    assert code == 75, output
    assert output.index("stopping") < output.index("SIGTERM again")
