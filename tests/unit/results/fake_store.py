"""A results store in memory, for the tests of delivery."""

from collections import Counter

from raydistill.results.translate import Parcel

Key = tuple[str, int, float, int]


class StoreDownError(ConnectionError):
    pass


class RefusedError(ValueError):
    pass


class FakeStore:
    """Keeps equal points once, as MLflow does; can fail before or after taking a parcel."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, object]] = {}
        self.points: dict[str, Counter[Key]] = {}
        self.deleted: list[str] = []
        self.fail_before: list[Exception] = []
        self.fail_after: list[Exception] = []
        self.fail_adopting: list[Exception] = []
        self.refused_metric: str | None = None
        self.num_openings = 0

    def open(self) -> "FakeStore":
        self.num_openings += 1
        return self

    def open_run(self, record_id: str, name: str, start_ms: int) -> str:
        for run_id, run in self.runs.items():
            if run["record_id"] == record_id and run_id not in self.deleted:
                return run_id
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = {
            "record_id": record_id,
            "name": name,
            "params": {},
            "tags": {},
            "files": {},
            "status": None,
        }
        self.points[run_id] = Counter()
        return run_id

    def link(self, run_id: str, parent: str) -> bool:
        found = [one for one, run in self.runs.items() if run["record_id"] == parent and self.has_run(one)]
        self.runs[run_id]["parent"] = found[0] if found else None
        return bool(found)

    def adopt(self, run_id: str, replaced: str) -> None:
        if self.fail_adopting:
            raise self.fail_adopting.pop(0)
        for run in self.runs.values():
            if run.get("parent") == replaced:
                run["parent"] = run_id

    def has_run(self, run_id: str) -> bool:
        return run_id in self.runs and run_id not in self.deleted

    def delete_run(self, run_id: str) -> None:
        self.deleted.append(run_id)

    def refuses(self, error: Exception) -> bool:
        return isinstance(error, RefusedError)

    def put(self, run_id: str, parcel: Parcel, end_ms: int | None = None) -> None:
        if self.fail_before:
            raise self.fail_before.pop(0)
        if self.refused_metric and any(p.key == self.refused_metric for p in parcel.points):
            raise RefusedError(self.refused_metric)
        run = self.runs[run_id]
        for point in parcel.points:
            self.points[run_id][(point.key, point.step, point.value, point.time_ms)] = 1
        for part in ("params", "tags", "files"):
            run[part].update(getattr(parcel, part))  # type: ignore[attr-defined]
        run["status"] = parcel.status or run["status"]
        if self.fail_after:
            raise self.fail_after.pop(0)

    def steps(self, run_id: str, key: str = "m") -> list[int]:
        return sorted(step for name, step, _, _ in self.points[run_id] if name == key)
