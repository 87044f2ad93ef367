# One machine's Airflow: its tasks run the steps as processes, so every environment is in one image. `compose.yaml`
# builds it from the images that `make images` has made, in which each environment lies where it lies here.
ARG TAG=0.1.0
FROM orrery/ml:${TAG} AS ml
FROM orrery/spark:${TAG} AS spark
FROM orrery/rag:${TAG} AS rag

FROM orrery/airflow:${TAG}
COPY --from=ml /opt/orrery/.venvs/ml /opt/orrery/.venvs/ml
COPY --from=ml /usr/lib/*-linux-gnu/libgomp.so.1* /usr/local/lib/orrery/
COPY --from=spark /opt/orrery/.venvs/spark /opt/orrery/.venvs/spark
COPY --from=rag /opt/orrery/.venvs/rag /opt/orrery/.venvs/rag
ENV ORRERY_PROFILE=local LD_LIBRARY_PATH=/usr/local/lib/orrery
