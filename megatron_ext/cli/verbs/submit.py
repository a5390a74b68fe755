"""`submit ...`: runs as jobs of Slurm. Checked first, then rendered, then submitted; `--dry-run` stops before Slurm."""
import json
import shlex
import sys
from collections.abc import Sequence

from megatron_ext.cli.notes import notes as config_notes
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.config.validate import ConfigErrors
from megatron_ext.errors import UserError
from megatron_ext.private import make_directory
from megatron_ext.submit import curating, disk, limits, placement, plan, render, slurm
from megatron_ext.submit.job import Job


def submit(config: Config, options: Options) -> int:
    """`config` is not read: a stage, each stage of the chain, or each point of a sweep has one of its own. Raises UserError."""
    if "prepare" in options.overrides:
        return _prepare(options)
    jobs = plan.jobs(options)
    errors = list(disk.problems(jobs))
    said = [line for job in jobs for run in job.runs[:1] for line in (*config_notes(run.config, run.words), *placement.notes(run.config), *disk.notes(job))]
    if not options.dry_run or not slurm.missing():
        try:
            for job in jobs:
                found, warnings = limits.beyond(job)
                errors, said = [*errors, *found], [*said, *warnings]
        except UserError as error:
            if not options.dry_run:
                raise
            said.append(f"the cluster's limits are not looked at: {error.reason}")
    for line in dict.fromkeys(said):
        print(f"note: {line}", file=sys.stderr, flush=True)
    if errors := list({str(error): error for error in errors}.values()):
        raise errors[0] if len(errors) == 1 else ConfigErrors(errors)
    if options.dry_run:
        _show(jobs, options)
        return 0
    numbers = _submit(jobs)
    _tell(jobs, numbers, options)
    return 0


def _prepare(options: Options) -> int:
    """Curation: its phases as arrays, one behind the other."""
    if options.sweeps:
        raise UserError("--sweep", options.sweeps[0], "goes with train, not with prepare")
    jobs = curating.parts([word for word in options.overrides if word != "prepare"])
    errors, said = [], []
    if not options.dry_run:
        for job in jobs:
            found, warnings = limits.beyond(job)
            errors, said = [*errors, *found], [*said, *warnings]
    for line in dict.fromkeys(said):
        print(f"note: {line}", file=sys.stderr, flush=True)
    if errors := list({str(error): error for error in errors}.values()):
        raise errors[0] if len(errors) == 1 else ConfigErrors(errors)
    if options.dry_run:
        shown = [{"name": job.name, "script": str(job.script), "text": curating.script(job), "after": list(job.after)} for job in jobs]
        print(json.dumps({"jobs": shown}) if options.json else "\n".join(one["text"] for one in shown))
        return 0
    for job in jobs:
        _write(job, curating.script(job))
    numbers = _queued(jobs)
    if options.json:
        print(json.dumps({"jobs": [{"name": job.name, "id": numbers[job.name], "script": str(job.script), "after": [numbers[name] for name in job.after]} for job in jobs]}))
        return 0
    for job in jobs:
        print(f"submitted   {job.name}: job {numbers[job.name]}" + (f", an array of {job.count}" if job.array else "") + f"; log {job.log(numbers[job.name], '0')}")
    return 0


def _submit(jobs: Sequence[Job]) -> dict[str, str]:
    """Job name -> number. All of them, or none."""
    for job in jobs:
        _write(job, render.script(job))
        if job.array:
            (job.folder / "sweep.json").write_text(job.points(), encoding="utf-8")
    if len(jobs) > 1:
        (jobs[0].folder.parent / "submit.sh").write_text(render.submission(jobs), encoding="utf-8")
    return _queued(jobs)


def _write(job: Job | curating.Part, text: str) -> None:
    make_directory(job.folder, private=job.config.run.private)
    job.script.write_text(text, encoding="utf-8")
    job.script.chmod(0o700)


def _queued(jobs: Sequence[Job | curating.Part]) -> dict[str, str]:
    """Job name -> number. All of them, or none."""
    numbers: dict[str, str] = {}
    try:
        for job in jobs:
            numbers[job.name] = slurm.sbatch(job, [numbers[name] for name in job.after])
    except UserError:
        slurm.cancel(list(numbers.values()))
        raise
    return numbers


def _show(jobs: Sequence[Job], options: Options) -> None:
    if options.json:
        print(json.dumps({"jobs": [{"name": job.name, "script": str(job.script), "text": render.script(job), "after": list(job.after),
                                    "placement": placement.lines(job.config)} for job in jobs]}))
        return
    for job in jobs:
        held = " ".join(slurm.dependency([f"NUMBER-OF-{name}" for name in job.after]))
        print(render.script(job), end="")
        print(f"# --dry-run: nothing was submitted. This would be {job.script}, and: sbatch {held + ' ' if held else ''}{job.script}\n")


def _tell(jobs: Sequence[Job], numbers: dict[str, str], options: Options) -> None:
    if options.json:
        print(json.dumps({"jobs": [{"name": job.name, "id": numbers[job.name], "script": str(job.script), "log": str(job.log(numbers[job.name], "0")),
                                    "after": [numbers[name] for name in job.after],
                                    "runs": [str(run.directory) for run in job.runs]} for job in jobs]}))
        return
    for job in jobs:
        number = numbers[job.name]
        print("\n".join(f"{'' if index else 'placement':<12}{line}" for index, line in enumerate(placement.lines(job.config))))
        after = f", after {', '.join(numbers[name] for name in job.after)}" if job.after else ""
        print(f"submitted   {job.name}: job {number}{after}" + (f", {len(job.runs)} points (sweep.json says which)" if job.array else ""))
        print(f"script      {job.script}\nlog         tail -F {shlex.quote(str(job.log(number, '0')))}")
    if len(jobs) > 1:
        print(f"report      python -m megatron_ext report run.dir={shlex.quote(str(jobs[0].folder.parent))}   (at any time)")
    together = ",".join(numbers.values())
    print(f"watch       squeue --jobs={together}\nend         scancel {' '.join(numbers.values())}   (scancel --batch --signal=USR1 {' '.join(numbers.values())}: "
          "save, stop, and queue again)")
