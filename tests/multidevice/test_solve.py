"""Factors spread over eight simulated devices."""


def test_layers_are_factored_and_solved_where_they_lie(run_with_devices, tmp_path):
    run_with_devices(8, "solve_worker.py", JAXEDIT_CACHE=str(tmp_path))
    assert len(list((tmp_path / "factors").iterdir())) == 5
