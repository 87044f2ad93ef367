"""The pages that Airflow's UI shows of Orrery: a project's model, a run's verdict, and what steps left to look at.

One FastAPI app (`app`), mounted by plugins/orrery_plugin.py. `access` says who may see what, `model` and
`verdict` read the ledger, `pages` and `chart` draw, `addresses` knows every URL.
"""
