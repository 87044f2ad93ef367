// Airflow keeps the theme a person chose in localStorage ("light", "dark" or "system"), and this page has its origin.
(function () {
  "use strict";
  function apply() {
    var chosen = null;
    try { chosen = window.localStorage.getItem("theme"); } catch (e) { /* no storage: the system's theme */ }
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
  }
  apply();
  // It is heard when the switch in Airflow's own page is used.
  window.addEventListener("storage", apply);
})();
