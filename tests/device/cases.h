// The cases, by file.
#pragma once

namespace test {

void run_step_cases();             // what a step computes
void run_mixed_cases();            // the same for arrays of several formats, and rounding by chance
void run_launch_cases();           // how it is launched: tables, graphs, fallbacks
void run_policy_cases();           // clip policies: their state, and what they make of a step
void run_update_clipping_cases();  // StableAdamW: rates by the size of the updates
void run_element_limit_cases();    // clipping by value
void run_agc_cases();              // AGC: by units of rows
void run_shim_cases();             // that the simulator sees what it is there to see

}  // namespace test
