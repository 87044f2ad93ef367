"""Trainings on machines of a cloud: Amazon SageMaker's training jobs.

`jobs` (light, pure) makes a job's document from a planned step and judges what became of the job; `client` (light)
asks for jobs and stops them; `submit` runs in the environment `cloud`, as a process of its own: it alone imports
SageMaker's SDK.
"""
