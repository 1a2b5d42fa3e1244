"""The command line's own layer: parsing, checks, exit codes, what is imported. No model is loaded here: where
a test says so, the session that would load one is replaced by a recorder."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tensortier import errors, workloads
from tensortier.cli import main, run
from tensortier.cli.session import Request, argument_text
from tensortier.deciding import Manual, Measure, Undecided
from tensortier.types import Sampling, Settings, Workload

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "tensortier.cli"]


def tensortier(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        **options,
    )


class Piped(io.TextIOWrapper):
    """Standard input that is no terminal."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Replaces the session: the requests that it would have been given."""
    requests: list[Request] = []
    monkeypatch.setattr(run, "run_session", requests.append)
    monkeypatch.setattr(sys, "stdin", Piped(b""))
    return requests


# --- parsing


def test_defaults_are_those_of_the_dataclasses(asked: list[Request]) -> None:
    assert main(["run", "-p", "hi"]) == 0
    assert asked[0].wish.settings == Settings()
    assert asked[0].wish.undecided == Undecided(context=True, kv_type=True, ubatch=True)
    assert asked[0].wish.workload is None
    assert asked[0].wish.measure is Measure.IF_IT_DECIDES
    assert asked[0].sampling == Sampling()
    assert not asked[0].wish.manual.given
    assert asked[0].wish.model == "smollm2"


def test_options_spelled_as_llama_cpp_spells_them(asked: list[Request]) -> None:
    arguments = "run m.gguf -p hi -ngl 99 -ot x=CPU -ot blk\\.1=CPU,b=RPC0 -n 5 -ncmoe 3 -ncffn 2 -cmoe -nkvo"
    arguments += " -ts 3,1 -dev A,B -ub 64 -b 128 -ctk q8_0 -ctv q4_0 -fa on -t 2 -tb 3 -c 512 -s Be"
    assert main(arguments.split()) == 0
    assert asked[0].wish.manual == Manual(
        n_gpu_layers=99,
        override_tensors=("x=CPU", "blk\\.1=CPU,b=RPC0"),
        cpu_moe=True,
        n_cpu_moe=3,
        n_cpu_ffn=2,
        tensor_split=(3.0, 1.0),
        devices=("A", "B"),
        kv_on_device=False,
    )
    assert asked[0].sampling.max_tokens == 5
    assert asked[0].system == "Be"
    assert asked[0].wish.settings == Settings(
        n_ctx=512,
        n_batch=128,
        n_ubatch=64,
        type_k="q8_0",
        type_v="q4_0",
        flash_attention="on",
        threads=2,
        threads_batch=3,
    )


@pytest.mark.parametrize("arguments", [["-n5"], ["--max-tokens=5"], ["-n", "5", "-ngl=all"]])
def test_one_letter_options_keep_their_forms(asked: list[Request], arguments: list[str]) -> None:
    # -ngl must not be read as -n with the value gl
    assert main(["run", "-p", "hi", *arguments]) == 0
    assert asked[0].sampling.max_tokens == 5


def test_a_batch_takes_the_micro_batch_down_with_it(asked: list[Request]) -> None:
    assert main(["run", "-p", "hi", "-b", "100"]) == 0
    assert (asked[0].wish.settings.n_batch, asked[0].wish.settings.n_ubatch) == (100, 100)


def test_what_is_given_is_no_longer_open(asked: list[Request]) -> None:
    for arguments, expected in [
        ("-c 4096", Undecided(context=False)),
        ("-ctk f16", Undecided(kv_type=False)),
        ("-ctv q8_0", Undecided(kv_type=False)),
        ("-fa off", Undecided(kv_type=False)),
        ("-ub 512", Undecided(ubatch=False)),
        ("-b 2048", Undecided(ubatch=False)),
    ]:
        assert main(["run", "-p", "hi", *arguments.split()]) == 0
        assert asked[-1].wish.undecided == expected


def test_workload_and_measuring(asked: list[Request]) -> None:
    assert main(["run", "-p", "hi", "--workload", "512:64:1024", "--no-calibrate"]) == 0
    assert asked[0].wish.workload == Workload("512:64:1024", 512, 64, 1024)
    assert asked[0].wish.measure is Measure.NEVER
    assert main(["run", "-p", "hi", "-w", "agent"]) == 0
    assert asked[1].wish.workload == workloads.NAMED["agent"]


def test_layers_auto_alone_leaves_the_plan_automatic(asked: list[Request]) -> None:
    assert main(["run", "-p", "hi", "-ngl", "auto"]) == 0
    assert main(["run", "-p", "hi", "-ngl", "0"]) == 0
    assert [r.wish.manual.given for r in asked] == [False, True]


def test_switches_reach_the_settings(asked: list[Request]) -> None:
    arguments = [
        "--no-repack",
        "--no-op-offload",
        "--load-mode",
        "mmap+mlock",
        "--rpc",
        "a:1,b:2",
        "--rpc",
        "::1:3",
    ]
    assert main(["run", "-p", "hi", *arguments]) == 0
    assert asked[0].wish.settings == Settings(repack=False, op_offload=False, load_mode="mmap+mlock")
    assert asked[0].wish.rpc == ("a:1", "b:2", "::1:3")


@pytest.mark.parametrize(
    "arguments",
    [
        "-c -1", "-n 0", "-n -2", "-n x", "-b 0", "-ub 0", "-b 64 -ub 65", "-t -1", "--top-p 1.1",
        "--top-p nan",
        "--top-k -1", "--min-p -0.1", "--temp -1", "--temp nan", "--temp inf", "--repeat-penalty 0",
        "--repeat-penalty nan", "--frequency-penalty 2.5", "--presence-penalty -3", "--seed -1",
        "--seed 4294967295", "-ctk q3_0", "-fa maybe", "--load-mode slow", "-ngl many", "-ngl -1", "-ts a",
        "-ts 0,0", "-ts nan", "-ts 1,-1", "-dev ,", "--rpc nowhere", "--rpc h:0", "--rpc h:99999", "--rpc :5",
        "-ncmoe -1", "-ncffn x", "--grammar /no/such/file", "-f /no/such/file", "-f file", "-v -q",
        "-c 16777217", "-t 513", "-tb 513", "-b 99999999999", "-ub 99999999999", "-n 2147483648",
        "--top-k 2147483648", "-ngl 2147483648", "-ncmoe 2147483648", "-ts 1e308,1e308", "-f /dev/zero",
        "--grammar /dev/null", "-s \udcff", "--stop \udcff", "-p \udcff",
        "--workload poem", "-w 1:2", "-ctv q8_0 -fa off", "--raw -s text", "--unknown", "m.gguf second",
        "--stop", "-ngl",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(
    asked: list[Request], capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert main(["run", "-p", "hi", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tensortier: error: ")
    assert captured.err.count("\n") == 1
    assert asked == []


@pytest.mark.parametrize("arguments", [["run", "-p", "hi", "--stop", ""], ["run", "-p", " "], ["nonsense"]])
def test_other_refusals(
    asked: list[Request], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert asked == []


# --- the prompt


def test_piped_data_is_the_prompt_or_follows_it(
    asked: list[Request], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from a file é\n", encoding="utf-8")
    for arguments, data, expected in [
        ([], "data é\n", "data é\n"),
        (["-p", "Sum up:"], "line 1\nline 2\n", "Sum up:\n\nline 1\nline 2"),
        (["-p", "alone"], "", "alone"),
        (["-f", str(file)], "", "from a file é\n"),
        (["-f", str(file)], "more", "from a file é\n\nmore"),
    ]:
        monkeypatch.setattr(sys, "stdin", Piped(data.encode()))
        assert main(["run", *arguments]) == 0
        assert asked[-1].prompt == expected


def test_an_argument_is_utf_8_in_every_locale() -> None:
    # what Python makes of the argument "é" where the locale's encoding is ASCII
    assert argument_text(os.fsdecode(b"h") + "\udcc3\udca9", "-p") == "hé"


@pytest.mark.parametrize("data", [b"", b" \n", b"\xff\xfe\x00"])
def test_no_usable_prompt_on_standard_input(
    asked: list[Request], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    monkeypatch.setattr(sys, "stdin", Piped(data))
    assert main(["run"]) == 2
    assert "standard input is" in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize("option", ["--json", "--raw"])
def test_one_shot_options_need_a_prompt(
    asked: list[Request], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    stdin = Piped(b"")
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["run"]) == 0
    assert asked[0].prompt is None
    assert main(["run", option]) == 2
    assert f"{option} needs a prompt" in capsys.readouterr().err


# --- errors


def all_errors(base: type[errors.TensortierError]) -> list[type[errors.TensortierError]]:
    return [base, *(found for child in base.__subclasses__() for found in all_errors(child))]


@pytest.mark.parametrize("kind", all_errors(errors.TensortierError))
def test_our_errors_end_with_their_code_and_one_line(
    asked: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: type[errors.TensortierError],
) -> None:
    def fail(request: Request) -> None:  # instead of the session
        raise kind("first line\nsecond line")

    monkeypatch.setattr(run, "run_session", fail)
    assert main(["run", "-p", "hi", "--verbose"]) == kind.exit_code
    assert capsys.readouterr().err == "tensortier: error: first line second line\n"


@pytest.mark.parametrize("verbose", [False, True])
def test_an_unexpected_error_is_called_a_bug(
    asked: list[Request], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verbose: bool
) -> None:
    def fail(request: Request) -> None:  # instead of the session
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(run, "run_session", fail)
    assert main(["run", "-p", "hi", *(["-v"] if verbose else [])]) == 1
    text = capsys.readouterr().err
    assert "ZeroDivisionError: oops (this is a bug" in text
    assert ("Traceback" in text) == verbose
    assert verbose or text.count("\n") == 1


def test_ctrl_c_anywhere_else(
    asked: list[Request], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(request: Request) -> None:  # instead of the session
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_session", interrupt)
    assert main(["run", "-p", "hi"]) == 130
    assert capsys.readouterr().err == "tensortier: error: interrupted\n"


def test_a_ctrl_c_inside_exec_ends_with_130() -> None:
    # CPython ends the process by the signal, whatever is made of a KeyboardInterrupt that came out of exec()
    script = """if True:
        import sys, types
        from tensortier import cli

        def execute(arguments):
            exec("import os, signal; os.kill(os.getpid(), signal.SIGINT); [0 for _ in range(10**6)]")

        sys.modules["tensortier.cli.app"] = types.SimpleNamespace(execute=execute)
        sys.exit(cli.main([]))
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 130
    assert result.stderr == "tensortier: error: interrupted\n"


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_process_that_is_ended_leaves_no_files(name: str, code: int, tmp_path: Path) -> None:
    script = f"""if True:
        import os, signal, sys, tempfile, time, types
        from tensortier import cli

        def execute(arguments):
            with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):
                os.kill(os.getpid(), signal.{name})
                time.sleep(600)

        sys.modules["tensortier.cli.app"] = types.SimpleNamespace(execute=execute)
        sys.exit(cli.main([]))
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (code, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "closed", "code", "out", "err"),
    [
        ("--version", ">&-", 1, "", "standard output is closed"),
        ("models nope", "2>&-", 2, "", ""),
        ("run", "<&-", 2, "", "standard input is empty"),
        ("run", "<&- >&- 2>&-", 1, "", ""),
        ("--version", ">/dev/full", 1, "", "No space left"),
    ],
)
def test_closed_and_full_streams(arguments: str, closed: str, code: int, out: str, err: str) -> None:
    line = f"'{sys.executable}' -m tensortier.cli {arguments} {closed}"
    result = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (code, out)
    assert result.stderr.count("\n") == (1 if err else 0)
    assert err in result.stderr


def test_warnings_of_libraries_and_long_errors_are_one_short_line(
    asked: list[Request], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def session(request: Request) -> None:  # instead of the session
        warnings.warn("first\nsecond", RuntimeWarning, stacklevel=1)
        raise errors.UsageError("x" * 5000)

    monkeypatch.setattr(run, "run_session", session)
    monkeypatch.setattr(sys, "warnoptions", [])
    assert main(["run", "-p", "hi"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "tensortier: warning: first second"
    assert 100 < len(second) < 1200


@pytest.mark.parametrize("columns", ["0", "10", "many"])
def test_no_terminal_is_too_narrow_for_a_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["models"]) == 0
    assert "smollm2" in capsys.readouterr().out


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", "~")  # for which expanduser has no answer either
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for command in (["models"], ["backend", "list"]):
        assert main(command) == 2
        assert capsys.readouterr().err.endswith("set the variable HOME\n")


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    for arguments in (["--help"], ["--version"]):
        with subprocess.Popen([*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE) as process:
            _, err = process.communicate(timeout=120)
        assert err == b""
        assert process.returncode not in (0, 2)
    os.close(write)


def test_backend_names_and_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backend", "build", "metal"]) == 2
    assert "rpc, vulkan, cuda" in capsys.readouterr().err
    assert main(["backend", "build", "rpc", "--cuda-architectures", "86"]) == 2
    assert main(["backend", "build", "rpc", "--jobs", "0"]) == 2


def test_backend_list_of_an_empty_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["backend", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["backend"]) == 0
    out = capsys.readouterr().out
    assert all(f"tensortier backend build {name}" in out for name in ("rpc", "vulkan", "cuda"))
    assert "\x1b" not in out


# --- the program as a whole


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    arguments = [sys.executable, "-X", "importtime", "-m", "tensortier.cli", "--help"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "typer" in imported
    heavy = {"numpy", "llama_cpp", "huggingface_hub", "psutil", "pynvml", "gguf", "ctypes", "asyncio"}
    assert not imported & heavy
    assert not imported & {
        f"tensortier.{name}" for name in ("engine", "hardware", "gguf", "planner", "library")
    }
    # in units of what importing the parser takes, so that neither a slow machine nor other work on it counts: 3 to 4
    # are usual
    least: dict[str, float] = {}
    for _ in range(5):
        for what in ("-c import typer", "-m tensortier.cli --help"):
            least[what] = min(processor_seconds(what), least.get(what, 60.0))
    needed, parser = least["-m tensortier.cli --help"], least["-c import typer"]
    assert needed < 8 * parser, f"{needed:.3f} s, {parser:.3f} s for the parser"


def processor_seconds(arguments: str) -> float:
    """Of Python with these arguments, whose output nobody reads."""
    option, rest = arguments.split(" ", 1)
    command = [sys.executable, option, *([rest] if option == "-c" else rest.split())]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_version_and_no_arguments() -> None:
    from importlib.metadata import version

    assert version("llama-cpp-python") in tensortier("--version").stdout
    nothing = tensortier()
    assert nothing.returncode == 0
    assert nothing.stdout == tensortier("-h").stdout
    assert "\x1b" not in nothing.stdout


def test_the_page_of_the_command_line_is_up_to_date(tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "gen_cli_docs.py")
    narrow = {**os.environ, "COLUMNS": "40", "TERM": "dumb"}
    check = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, env=narrow)
    assert check.returncode == 0, check.stderr
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert str(ROOT) not in page
    for option in ("-ngl", "--override-tensor", "--cuda-architectures", "--match", "/save! FILE"):
        assert option in page
