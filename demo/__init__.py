"""A whole run on real handwritten digits, with every command from an untrained teacher to an exported student.

`run` calls the commands on what `data` and `models` make, `evaluate` and `report` measure the students. Imports both
halves and common.
"""
