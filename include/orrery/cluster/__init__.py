"""Steps as pods: what a pod is made of, how its end is judged, how many are watched at once. Imports no Airflow."""
