"use strict";

// The token is behind the #: no server log and no other site ever sees it. It leaves the
// address bar before anything else happens.
function join() {
  const token = location.hash.slice(1);
  if (token) {
    history.replaceState(null, "", location.pathname);
    document.querySelector("#token").value = token;
    document.querySelector("form").submit();
  }
}

join();
window.addEventListener("hashchange", join); // a link that is opened in a tab that is here already
