"""What a run leaves on disk, and what of it is kept when it is resumed."""

from pathlib import Path

from specdec.lab.records import RunFolder
from tests.lab.made import generation, step


def test_sources_of_finished_prompts_survive_a_resume(tmp_path: Path):
    folder = RunFolder(tmp_path, config={}, resume=False)
    folder.begin()
    shared = {**step([7, 8], [1, 1], [1, 0], [2, 1]), "sources": [{"a": [1, 1]}, {"a": [1, 0]}]}
    bare = {**step([8], [1], [0], [1]), "sources": []}
    for record in (shared, bare):
        folder.main.steps.append(record)
    folder.main.generations.append({**generation(0, [5], 1), "request": 8})
    folder.close()

    folder = RunFolder(tmp_path, config={}, resume=True)
    folder.write_error(ValueError("of the run before"))
    folder.begin()
    kept, other = folder.main.steps.records
    assert (kept["requests"], kept["sources"]) == ([8], [{"a": [1, 0]}])
    assert other == bare
    assert not (tmp_path / "error.txt").exists()
    folder.close()
