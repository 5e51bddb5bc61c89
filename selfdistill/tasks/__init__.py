"""Problems and the checkers of their answers.

interface.py    Task, Problem, Verdict: what the trainer knows of any task
build.py        the configured task
arithmetic/     chained arithmetic, embedded
dataset.py      problems of a file (json_lines.py) or of a data set (hub.py), row by row (rows.py)
splits.py       lists of problems, cut into train, dev and test
python_task.py  problems and a reward in a file of one's own (user_file.py)
answers/        comparing final answers, which final_answer.py reads from a response
steps.py        numbered steps of a response
"""
