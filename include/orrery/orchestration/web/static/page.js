// Keeps a page fresh without flicker, lets links out of Airflow's frame, and asks Airflow for a rollback.
(function () {
  "use strict";
  var framed = window.parent !== window;

  // -- links: the frame is sandboxed (no popups, no navigation of the page around it), but of the same origin ----
  document.addEventListener("click", function (event) {
    var link = event.target.closest && event.target.closest("a[href]");
    if (!link || !framed || link.hasAttribute("data-here")) return;
    var outside;
    try { outside = window.parent.document; } catch (e) { return; }
    event.preventDefault();
    var copy = outside.createElement("a");
    copy.href = link.href;
    copy.rel = "noopener noreferrer";
    var inApp = link.hasAttribute("data-app") && !(event.ctrlKey || event.metaKey || event.shiftKey);
    copy.target = inApp ? "_self" : "_blank";
    outside.body.appendChild(copy);
    copy.click();
    copy.remove();
  });

  // -- live: only what is different is put in place; what is open stays open ------------------------------------
  var began = document.getElementById("live");
  var last = began ? began.innerHTML : "";  // before anyone opened anything
  function marks(root) {
    return Array.prototype.map.call(root.querySelectorAll("details"), function (d) { return d.open; });
  }
  function refresh() {
    var main = document.getElementById("live");
    var every = main && Number(main.dataset.live);
    if (!every) return;
    setTimeout(function () {
      if (document.hidden) { refresh(); return; }
      fetch(window.location.href, { credentials: "same-origin", headers: { Accept: "text/html" } })
        .then(function (answer) { if (!answer.ok) throw new Error(String(answer.status)); return answer.text(); })
        .then(function (text) {
          var next = new DOMParser().parseFromString(text, "text/html").getElementById("live");
          if (!next) return;
          if (next.innerHTML !== last || next.dataset.live !== main.dataset.live) {
            last = next.innerHTML;
            var open = marks(main), focus = document.activeElement && document.activeElement.getAttribute("data-open");
            var fresh = document.importNode(next, true);
            Array.prototype.forEach.call(fresh.querySelectorAll("details"), function (d, i) { d.open = !!open[i]; });
            main.replaceWith(fresh);
            if (focus) { var again = fresh.querySelector("[data-open='" + focus + "']"); if (again) again.focus(); }
          }
        })
        .catch(function () { /* Airflow is away for a moment: the page stays as it is */ })
        .finally(refresh);
    }, every * 1000);
  }
  refresh();

  // -- rollback -------------------------------------------------------------------------------------------------
  var dialog = document.getElementById("rollback");
  if (!dialog) return;
  var form = dialog.querySelector("form");
  var answer = form.querySelector(".answer");
  var submit = form.querySelector("[type=submit]");
  document.addEventListener("click", function (event) {
    if (event.target.closest && event.target.closest("[data-open=rollback]")) {
      answer.textContent = "";
      answer.className = "answer";
      submit.disabled = false;
      dialog.showModal();
      form.elements.reason.focus();
    }
  });
  form.querySelector("[data-close]").addEventListener("click", function () { dialog.close(); });
  form.elements.version.addEventListener("change", function () {
    document.getElementById("rollback-to").textContent = form.elements.version.value;
  });
  function say(text, kind) { answer.textContent = text; answer.className = "answer " + (kind || ""); }
  form.addEventListener("submit", function (event) {
    event.preventDefault();
    var reason = form.elements.reason.value.trim();
    if (!reason) { say("Say why: it goes into the ledger.", "bad"); form.elements.reason.focus(); return; }
    submit.disabled = true;
    say("Asking Airflow…");
    fetch(form.dataset.rollback, {
      method: "POST",
      credentials: "same-origin",
      headers: { "Content-Type": "application/json", Accept: "application/json" },
      body: JSON.stringify({ logical_date: null, conf: { version: form.elements.version.value, reason: reason } })
    }).then(function (response) {
      return response.json().catch(function () { return {}; }).then(function (body) {
        if (!response.ok) {
          var detail = typeof body.detail === "string" ? body.detail : "";
          throw new Error(response.status === 403 ? "Airflow does not let you start this Dag."
            : "Airflow answered " + response.status + (detail ? ": " + detail : "."));
        }
        say("Started. ", "good");
        var link = document.createElement("a");
        link.href = form.dataset.run + encodeURIComponent(body.dag_run_id);
        link.setAttribute("data-app", "");
        link.textContent = "Look at its run";
        answer.appendChild(link);
        link.focus();
      });
    }).catch(function (error) { submit.disabled = false; say(error.message || "Airflow cannot be reached.", "bad"); });
  });
})();
