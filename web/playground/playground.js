/** All elements of the playground; one script for a page. */

import './class_playground.js';
import './text_playground.js';
import './guided_strips.js';
