"""bench/gpu_proof.py without a GPU: its parts as toys on a CPU, and what it does when one fails, hangs or has run before."""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "bench").glob("gpu_proof*.py"))
ABOUT = {
    "device": "NVIDIA H200", "gpus": 1, "torch": "2.11.0", "kernel": "a kernel", "cpus": 16, "memory_gib": 128, "commit": "abc",
    "versions": {"transformers": "5.17.0", "trl": "1.16.0", "peft": "0.21.2", "accelerate": "1.15.0"},
}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    """A module of bench/, by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


def call(*words, timeout=900):
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_proof.py"), "--device", "cpu", "--minutes", "30", *map(str, words)],
        capture_output=True, text=True, timeout=timeout, cwd=ROOT,
    )  # fmt: skip


def results(folder):
    return {
        file.stem: json.loads(file.read_text()) for file in (folder / "parts").glob("*.json") if file.stem != "about"
    }


# --- the parts, for real ---------------------------------------------------------------------------------------------


def run_parts(names, out):
    done = call("--out", out, "--jobs", "1", "--only", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(out)
    assert {name: (found[name]["state"], found[name]["ok"]) for name in names} == dict.fromkeys(names, ("done", True))
    return found


def test_parts_on_a_cpu(forks, tmp_path):
    """Once for real; the same command again finds all done and runs none of them."""
    names = ["attention", "families", "lm-head", "sft-1b-hh", "profile"]
    found = run_parts(names, tmp_path)
    assert [len(found[name]["rows"]) for name in names[:3]] == [39, 12, 2]
    assert all(row["equal"] for name in names[:3] for row in found[name]["rows"])
    variants = found["sft-1b-hh"]["variants"]
    assert set(variants) >= {"trl", "trl-padding-free", "packed"}  # with Liger's kernels, where they are installed
    assert variants["packed"]["against"]["trl"]["loss"] < 2e-2  # bf16
    assert found["profile"]["items"] > 0 and "aten::mm" in found["profile"]["table"]
    (report,) = tmp_path.glob("gpu-cpu-*.md")
    text = report.read_text()
    assert "**Toy sizes on a CPU" in text and "Not judged on a CPU." in text and "39 of 39 cases equal" in text
    assert str(tmp_path) not in text and str(ROOT) not in text
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").glob("*.json") if file.stem != "about"}
    again = call("--out", tmp_path, "--only", *names)
    assert again.returncode == 0 and "cases equal" not in again.stdout
    assert before == {file: file.stat().st_mtime_ns for file in before}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["qlora", "nf4", "dpo-8b-hh", "reward-8b-hh", "dpo-8b-hh-large", "sft-8b-hh-checkpointed"]
)
def test_other_parts_on_a_cpu(name, forks, tmp_path):
    if name in ("qlora", "nf4"):
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    run_parts([name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "fsdp2_hsdp"])
def test_launch_files_on_a_cpu(name, forks, tmp_path):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    found = run_parts([f"launch-{name}"], tmp_path)[f"launch-{name}"]
    assert found["summary"].endswith("stopped, resumed, finished") and len(found["losses"]) == 2


def test_every_launch_file_is_a_part(script):
    parts = script("gpu_proof_parts").PARTS
    files = {file.stem for file in (ROOT / "launch").glob("*.yaml")} - {"cpu"}
    assert {name.removeprefix("launch-") for name in parts if name.startswith("launch-")} == files


def test_cases_name_what_their_benches_have(script):
    trl = script("gpu_proof_trl")
    for case in trl.CASES.values():
        bench = trl.BENCHES[case.stage]
        assert {variant.removesuffix(trl.LIGER) for variant in case.variants} <= set(bench.VARIANTS)
        assert case.shape in script("compare").SHAPES and case.lengths in script("compare").LENGTHS


def test_a_wrong_kernel_fails_its_part(script, monkeypatch, tmp_path):
    """And so does a fused head that is off, and a model that computes something else."""
    import torch

    import rlhf.packing.lm_head as lm_head
    import rlhf.preflight.equality as equality

    equal = script("gpu_proof_equal")
    context = script("gpu_proof_device").Context("cpu", True, str(tmp_path), 0)
    monkeypatch.setattr(equality, "LAYOUTS", {"one pair": equality.LAYOUTS["one pair"]})
    real = equality.attention_forward
    monkeypatch.setattr(equality, "attention_forward", lambda *args, **kwargs: (real(*args, **kwargs)[0] * 1.1, None))
    found = equal.attention(context)
    assert not found["ok"] and len(found["wrong"]) == 6 and found["summary"].startswith("3 of 9 cases equal")
    monkeypatch.setattr(equality, "pack_backbone", lambda model, *how: [p.data.mul_(1.05) for p in model.parameters()])
    assert not equal.families(context)["ok"]
    apply = lm_head.LogProbs.apply
    monkeypatch.setattr(lm_head.LogProbs, "apply", lambda *args: tuple(x if x is None else x + torch.ones_like(x) for x in apply(*args)))  # fmt: skip
    assert not equal.lm_head(context)["ok"]


def test_a_run_that_went_wrong_is_told(script):
    check = script("gpu_proof_runs").check_steps
    step = {"loss": 0.69, "grad_norm": 1.0}
    assert check([step, step], 0.6931) == []
    assert check([step], None) == ["1 steps were logged, expected 2"]
    assert check([{**step, "loss": 0.8}, step], 0.6931) == ["the first loss is 0.8000, expected 0.6931 within 0.05"]
    assert "not finite" in check([step, {**step, "loss": float("nan")}], None)[0]
    assert check([{**step, "grad_norm": 0.0}] * 2, None) == ["no gradient reached the adapter"]


# --- the runner ------------------------------------------------------------------------------------------------------


@pytest.fixture
def proof(script, monkeypatch, tmp_path):
    """proof({part: Python of its process}, ...) -> (Proof that has run, exit code); OUT in that Python writes a result."""
    module, parts = script("gpu_proof"), script("gpu_proof_parts")

    def run(code, alone=(), late_once=None, ends_with=None, **arguments):
        """late_once: {part: a file; when it is there the part's time is over}; ends_with: a part with which all time is over."""
        made = {n: parts.Part(f"what {n} shows", None, n in alone, 600, 1) for n in code}
        monkeypatch.setattr(parts, "PARTS", made)
        given = dict(minutes=5, only=None, fresh=False, device="cuda", jobs=2, out=str(tmp_path / "out"), wheels=None,
                     report=str(tmp_path / "report.md"), go_on_from=None) | arguments  # fmt: skip

        class Proof(module.Proof):
            started = []

            def look_at_machine(self):
                self.about = ABOUT

            def start(self, name, seconds):
                self.started.append(name)
                out = self.result_file(name)
                out.unlink(missing_ok=True)
                result = {"state": "done", "ok": True, "summary": f"{name} was well", "seconds": 1.0, "about": ABOUT}
                write = f"OUT = lambda **more: open({str(out)!r}, 'w').write(json.dumps({result!r} | more))"
                with open(self.folder / "logs" / f"{name}.log", "w") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-SEc", f"import json, os, time\n{write}\n{code[name]}"],
                        stdout=log, stderr=log, start_new_session=True,
                    )  # fmt: skip
                ends = module.time.monotonic() + seconds
                while name in (late_once or {}) and not late_once[name].exists():
                    time.sleep(0.01)
                    ends = module.time.monotonic()
                if name == ends_with:
                    ends = self.deadline = module.time.monotonic()
                return module.Running(name, process, ends, out)

        Proof.started = []
        made_proof = Proof(SimpleNamespace(**given), Path(given["out"]), str(tmp_path))
        made_proof.run()
        return made_proof, made_proof.report()

    run.module, run.folder = module, tmp_path
    return run


FINE = "OUT()"


def test_only_launch_files_of_several_processes_see_all_gpus(script, monkeypatch, tmp_path):
    """One process that sees several would be refused; and programs of this Python's environment are found, such as ninja."""
    module, started = script("gpu_proof"), {}
    monkeypatch.setattr(
        module.subprocess,
        "Popen",
        lambda words, env, **rest: started.__setitem__(words[words.index("--part") + 1], env),
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    arguments = {
        "minutes": 5,
        "only": ["none"],
        "fresh": False,
        "device": "cuda",
        "jobs": 2,
        "wheels": None,
        "go_on_from": None,
    }
    proof = module.Proof(SimpleNamespace(**arguments), tmp_path, str(tmp_path))
    monkeypatch.setattr(proof, "look_at_machine", lambda: None)
    monkeypatch.setattr(proof, "chosen", list)
    proof.run()
    for name in ("attention", "launch-single", "launch-ddp"):
        proof.start(name, 1)
    seen = {name: env["CUDA_VISIBLE_DEVICES"] for name, env in started.items()}
    assert seen == {"attention": "2", "launch-single": "2", "launch-ddp": "2,3"}
    assert started["launch-ddp"]["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_part_that_fails_stops_no_other(proof, capsys):
    code = {
        "a": FINE,
        "b": "OUT(state='failed', ok=False, summary='b is unequal'); print('last words')",
        "c": "os.abort()",
        "d": FINE,
    }
    done, exit_code = proof(code)
    assert exit_code == 1 and done.started == list("abcd")
    found = results(proof.folder / "out")
    assert [found[name]["ok"] for name in "abcd"] == [True, False, False, True]
    assert found["b"]["tail"] == "last words\n" and found["c"]["summary"] == "its process ended with exit code -6"
    text = (proof.folder / "report.md").read_text()
    assert "| b: what b shows | **failed** | b is unequal |" in text and "### b\n\n```\nlast words\n```" in text
    done, exit_code = proof({name: FINE for name in code})  # mended: only those that failed run again
    assert exit_code == 0 and done.started == ["b", "c"]
    done, _ = proof({name: FINE for name in code}, fresh=True)
    assert done.started == list("abcd") and (proof.folder / "out.old-1" / "parts" / "b.json").is_file()


def test_a_part_that_hangs_is_ended_with_what_it_started(proof):
    pid = proof.folder / "pid"
    write = f"open({str(pid)!r} + '-', 'w').write(str(p)); os.rename({str(pid)!r} + '-', {str(pid)!r})"
    hang = f"p = os.fork()\nif p: {write}\ntime.sleep(600)"
    _, exit_code = proof({"a": hang, "b": FINE}, late_once={"a": pid})
    found = results(proof.folder / "out")
    assert exit_code == 1 and found["a"]["state"] == "timeout" and found["a"]["summary"] == "it ran out of time"
    assert found["b"]["ok"]
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_the_total_budget(proof, capsys):
    """What does not fit is not started, and what the end cuts off has not failed; the next call runs both."""
    done, exit_code = proof({"a": "time.sleep(600)", "b": FINE}, jobs=1, ends_with="a")
    assert exit_code == 0 and done.started == ["a"] and results(proof.folder / "out") == {}
    assert "not run yet, the same command runs them: a b" in capsys.readouterr().out
    done, _ = proof({"a": FINE, "b": FINE})
    assert done.started == ["a", "b"]


def test_a_timed_part_runs_alone(proof):
    """Each of the others holds a file while it runs."""
    held = "open(f'{d}/{n}', 'w'); time.sleep(0.3); os.remove(f'{d}/{n}'); OUT()"
    head = f"d = {str(proof.folder)!r}; n = 'held-%s'\n"
    alone = f"import glob\nOUT(ok=not glob.glob({str(proof.folder)!r} + '/held-*'))\ntime.sleep(0.3)"
    code = {"a": head % "a" + held, "b": alone, "c": head % "c" + held}
    _, exit_code = proof(code, alone=("b",), jobs=3)
    assert exit_code == 0


def test_results_of_another_machine_are_not_this_ones(proof):
    proof({"a": FINE, "b": FINE})
    file = proof.folder / "out" / "parts" / "a.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"about": ABOUT | {"device": "NVIDIA L4"}}))
    done, _ = proof({"a": FINE, "b": FINE})
    assert done.started == ["a"]


def test_going_on_from_the_results_of_another_call(proof):
    """As on a machine that starts empty each time."""
    proof({"a": FINE, "b": "os.abort()"})
    earlier = proof.folder / "out" / "results.json"
    done, exit_code = proof({"a": FINE, "b": FINE}, out=str(proof.folder / "new"), go_on_from=str(earlier))
    assert exit_code == 0 and done.started == ["b"]


def test_an_unknown_part_is_refused(proof):
    with pytest.raises(SystemExit, match="there is no part 'atention'; --list names them"):
        proof({"attention": FINE}, only=["atention"])


def test_without_a_gpu_it_says_so(forks, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_proof.py"), "--out", str(tmp_path), "--only", "attention"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1 and "torch can't use a GPU here" in done.stderr and "--device cpu" in done.stderr


# --- the report ------------------------------------------------------------------------------------------------------


def case(stage, speed, memory, mfu=None, shape="llama-8b", ours="shared", other="trl", checkpointed=False):
    against = {other: {"speed": speed, "memory": memory, "loss": 1e-3}}
    base = {"per_second": 1.0, "seconds": [1.0], "losses": [0.7], "memory_gib": 100.0, "mfu": 0.1, "of_matmul": 0.1, "tokens": 5,
            "padded": 9, "parameters": 8e9}  # fmt: skip
    variants = {other: base | {"against": {}}, ours: base | {"per_second": speed, "mfu": mfu, "against": against}}
    about = {
        "stage": stage,
        "shape": shape,
        "lengths": "hh-lengths",
        "examples": 8,
        "train": "lora",
        "gradient_checkpointing": checkpointed,
    }
    return {
        "state": "done",
        "ok": True,
        "summary": "",
        "variants": variants,
        "ours": ours,
        "left_out": {},
        "case": about,
        "about": ABOUT,
    }


def test_targets_in_words(script):
    targets = script("gpu_proof_report").targets
    found = {
        "dpo-8b-hh": case("dpo", 6.0, 0.3, mfu=0.5), "dpo-8b-long": case("dpo", 4.5, 0.4), "reward-8b-hh": case("reward", 2.0, 0.6),
        "sft-8b-hh": case("sft", 1.2, 0.5, other="trl-padding-free", ours="packed"),
        "sft-8b-hh-checkpointed": case("sft", 1.3, 0.4, mfu=0.2, ours="packed", other="trl-padding-free", checkpointed=True),
    }  # fmt: skip
    assert targets(found) == [
        "- DPO at least 5x TRL: **met in part** (dpo-8b-hh 6.00x, dpo-8b-long 4.50x)",
        "- DPO at least 4x TRL with precomputed reference: **not measured**",
        "- reward model at least 3x TRL: **not met** (reward-8b-hh 2.00x)",
        "- SFT at least 1.1x TRL's padding-free: **met** (sft-8b-hh 1.20x, sft-8b-hh-checkpointed 1.30x)",
        "- memory at most half of TRL's: **met in part** (dpo-8b-hh 0.30, dpo-8b-long 0.40, reward-8b-hh 0.60, sft-8b-hh 0.50, "
        "sft-8b-hh-checkpointed 0.40)",
        "- MFU at least 45% (llama-8b): **met** (dpo-8b-hh 50%)",
    ]


def test_the_fastest_of_trls_is_what_counts(script):
    report = script("gpu_proof_report")
    result = case("dpo", 6.0, 0.3)
    result["variants"]["shared"]["against"]["trl+liger"] = {"speed": 4.8, "memory": 0.55, "loss": 0.0}
    assert report.speed(result, "trl") == 4.8 and report.memory_share(result) == 0.55
    assert report.speed(result, "trl-precomputed") is None


def test_ratios_by_hand(script):
    """Steps of 2 and 4 s against 6 and 8: 3 and 2 times, so 2.5; 8 pairs in 6 s; losses 0.1 apart at most."""
    runs = {"trl": {"seconds": [6.0, 8.0], "losses": [0.7, 0.5], "memory": 8}, "shared": {"seconds": [2.0, 4.0], "losses": [0.7, 0.6], "memory": 2}}  # fmt: skip
    runs = {name: run | {"examples": 4, "flops": [1e15, 2e15], "tokens": [3, 4], "padded": [5, 6], "parameters": 9} for name, run in runs.items()}  # fmt: skip
    found = script("gpu_proof_trl").compared(runs, "NVIDIA H200", 1e15)["shared"]
    assert found["against"]["trl"] == {"speed": 2.5, "memory": 0.25, "loss": pytest.approx(0.1)}
    assert found["per_second"] == pytest.approx(8 / 6) and found["of_matmul"] == pytest.approx(0.5)
    assert found["mfu"] == pytest.approx(0.5e15 / 989e12)


def test_idle_share_by_hand(script):
    idle_share = script("gpu_proof_trl").idle_share
    assert idle_share([(1, 3), (2, 4), (6, 7)], 0, 10) == pytest.approx(0.6)
    assert idle_share([(0, 10), (2, 3)], 0, 10) == pytest.approx(0.0)


def test_a_report_names_its_device_and_date(script):
    assert re.fullmatch(r"gpu-nvidia-h200-\d{4}-\d\d-\d\d\.md", script("gpu_proof_report").file_name(ABOUT))


# --- what is brought along, and CUDA ---------------------------------------------------------------------------------


def make_wheel(folder, name, version):
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{name}.py", f"version = {version!r}\n")
        file.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: not-to-be-had\n",
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return wheel


def test_wheels_are_used_without_an_index(script, tmp_path):
    """What is installed already stays; what a wheel needs in turn is the machine's own business."""
    import trl

    wheels = script("gpu_proof_wheels")
    make_wheel(tmp_path / "wheels", "brought_along", "1.2.3")
    make_wheel(tmp_path / "wheels", "trl", trl.__version__)
    make_wheel(tmp_path / "wheels", "peft", "0.21.99")  # what is here is another, within this project's bounds
    site = wheels.install(tmp_path / "wheels", tmp_path / "site")
    assert (site / "brought_along.py").read_text() == "version = '1.2.3'\n" and not (site / "trl.py").exists()
    assert not (site / "peft.py").exists()
    assert not wheels.is_installed(make_wheel(tmp_path / "others", "nowhere", "1"), site)
    assert wheels.is_installed(tmp_path / "wheels" / "brought_along-1.2.3-py3-none-any.whl", site)
    assert not wheels.is_installed(tmp_path / "wheels" / "brought_along-1.2.4-py3-none-any.whl", site)
    with pytest.raises(SystemExit, match="holds no wheels; --collect"):
        wheels.install(tmp_path / "none", site)


def test_wheels_are_those_of_the_lock_file(script):
    wheels = script("gpu_proof_wheels")
    lock = (ROOT / "requirements.lock").read_text()
    assert all(re.search(rf"^{name}==", lock, re.M) for name in wheels.NEEDED)


def test_wheels_bring_what_deepspeed_imports(script):
    """GPU images have torch and what it needs; pydantic, which DeepSpeed imports, is not among that, nor what it needs in turn."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    needed, waiting = set(), ["pydantic"]
    while waiting:
        name = script("gpu_proof_wheels").plain(waiting.pop())
        if name not in needed and name != "typing-extensions":  # torch's own
            needed.add(name)
            lines = importlib.metadata.requires(name) or []
            waiting += [re.match(r"[\w.-]+", line).group() for line in lines if "extra ==" not in line]
    assert needed <= set(script("gpu_proof_wheels").NEEDED)


def test_torch_cuda_is_called_in_one_file_behind_a_check():
    """Names of torch.cuda in these scripts: in functions of gpu_proof_device.py that ask for the device first."""
    guarded = 0
    for path in SCRIPTS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            calls = [
                n for n in ast.walk(function) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "torch.cuda"
            ]
            if calls:
                assert path.name == "gpu_proof_device.py" and "device == 'cuda'" in ast.unparse(function), (
                    path.name,
                    function.name,
                )
                guarded += len(calls)
    assert guarded >= 8
