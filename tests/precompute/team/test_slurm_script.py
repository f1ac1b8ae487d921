"""The sbatch file: what it asks of Slurm, and its body run by bash with stand-ins for Slurm and for the program."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from mimir_precompute.cli import app as cli
from mimir_precompute.team.slurm_script import SlurmRequest, slurm_script
from mimir_shared.errors import InputError
from tests.precompute.team.fake_team import wait_for

OPTIONS = ["--cache", "my cache", "--preset", "tiny"]


def write_program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def start_script(folder: Path, text: str, program: str, **variables: str) -> subprocess.Popen[str]:
    """Run the file as Slurm would, with a stand-in for the program; what is queued again stands in `requeued`."""
    (folder / "bin").mkdir()
    write_program(folder / "bin", "mimir-precompute", f'printf "%s|" "$@" > arguments\n{program}')
    write_program(folder / "bin", "scontrol", 'echo "$@" >> requeued')
    (folder / "job.sh").write_text(text)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", **variables}
    environment = {**os.environ, **slurm, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", "job.sh"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def requeued(folder: Path) -> str:
    path = folder / "requeued"
    return path.read_text() if path.exists() else ""


def test_it_is_bash_and_asks_for_an_array_of_one_gpu_each_that_is_queued_again() -> None:
    request = SlurmRequest(tasks=64, at_once=16, extra=("--partition=gpu",), setup=("source .venv/bin/activate",))
    text = slurm_script(request, OPTIONS)
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    for option in ("--array=0-63%16", "--gres=gpu:1", "--requeue", "--signal=B:TERM@60", "--open-mode=append",
                   "--partition=gpu", "--output=logs/%x-%A_%a.log"):  # fmt: skip
        assert option in options
    assert text.index("#SBATCH --partition") < text.index("source .venv") < text.index("mimir-precompute encode")
    assert "mimir-precompute encode --cache 'my cache' --preset tiny --shards auto &" in text


def test_the_program_is_called_as_asked_and_its_exit_code_is_that_of_the_task(tmp_path: Path) -> None:
    request = SlurmRequest(prefix="env GREETING=hello")
    job = start_script(tmp_path, slurm_script(request, OPTIONS), "exit 0")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said
    assert (tmp_path / "arguments").read_text() == "encode|--cache|my cache|--preset|tiny|--shards|auto|"
    assert "task 3 of job 70 on" in said
    assert requeued(tmp_path) == ""


@pytest.mark.parametrize(("code", "again"), [(2, ""), (3, ""), (4, ""), (1, ""), (5, "requeue 70_3\n")])
def test_only_a_failed_machine_is_a_reason_to_try_again(tmp_path: Path, code: int, again: str) -> None:
    job = start_script(tmp_path, slurm_script(SlurmRequest(), OPTIONS), f"exit {code}")
    job.communicate(timeout=60)
    assert job.returncode == code
    assert requeued(tmp_path) == again


def test_it_is_not_queued_again_for_ever(tmp_path: Path) -> None:
    job = start_script(tmp_path, slurm_script(SlurmRequest(), OPTIONS), "exit 5", SLURM_RESTART_COUNT="20")
    job.communicate(timeout=60)
    assert job.returncode == 5
    assert requeued(tmp_path) == ""


def test_sigterm_to_the_shell_ends_the_program_and_queues_the_task_again(tmp_path: Path) -> None:
    program = 'trap "touch told; exit 143" TERM; touch ready; while true; do sleep 0.05; done'
    job = start_script(tmp_path, slurm_script(SlurmRequest(), OPTIONS), program)
    wait_for((tmp_path / "ready").exists, "the program was not started")
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 143, said
    assert (tmp_path / "told").exists()
    assert requeued(tmp_path) == "requeue 70_3\n"


def test_what_would_end_its_line_of_the_file_is_refused() -> None:
    for wrong in (
        {"time": "1:00\nrm"}, {"name": "a b"}, {"log_folder": "logs\nrm"}, {"extra": ("--partition=a\nrm",)},
        {"extra": ("gpu",)}, {"tasks": 0}, {"gpus": -1},
    ):  # fmt: skip
        with pytest.raises(InputError):
            SlurmRequest(**wrong)  # type: ignore[arg-type]


def test_the_command_checks_the_options_of_encode_before_it_prints(capfd: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["mimir-precompute", "slurm-script", *arguments])
            try:
                cli.main()
            except SystemExit as end:
                return int(end.code or 0), *capfd.readouterr()
        return 0, *capfd.readouterr()

    code, out, _ = call("--tasks", "4", "--", "mimir-precompute", "encode", "--cache", "c", "--workers", "auto")
    assert code == 0
    assert "mimir-precompute encode --cache c --workers auto --shards auto &" in out
    code, out, err = call("--", "encode", "clips", "--cache", "c")
    assert (code, out) == (2, "")
    assert "plan once before, `mimir-precompute plan clips --cache c …`" in err
    code, out, err = call("--", "--cache", "c", "--preset", "cogvideox-6b")
    assert (code, out) == (2, "")
    assert "--preset 'cogvideox-6b': expected one of tiny, cogvideox-2b, cogvideox-5b" in err
    code, out, err = call("--", "--cashe", "c")
    assert (code, out) == (2, "")
    assert "No such option" in err
