"use strict";

// The token is behind the #: no server log and no other site ever sees it. It leaves the
// address bar before anything else happens.
const token = location.hash.slice(1);
if (token) {
  history.replaceState(null, "", "/join");
  document.querySelector("#token").value = token;
  document.querySelector("form").submit();
}
