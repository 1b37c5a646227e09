"""`vlm score`: anyone's prediction files to official scores, with intervals.

vqav2.py, gqa.py, nlvr2.py   official files to what `vlm.metrics` takes; every defect one error
fields.py                    fields that a release may lack
predictions.py               prediction files, and whether they fit the split
report.py                    the JSON file and the tables
"""
