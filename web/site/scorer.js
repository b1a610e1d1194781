/** How the search ranks: what is to be read before what is to be looked up. */
var Scorer = {
  score: ([docname, title, anchor, description, score]) => {
    if (/^notebooks\/\d/.test(docname)) return score + 10;
    return /^(api|gallery|equations)\b/.test(docname) ? score - 10 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 0, 1: 0, 2: 0 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
