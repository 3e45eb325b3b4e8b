"""The practice world (tasks with known truth, made on the fly) and the small base that was trained in it."""
