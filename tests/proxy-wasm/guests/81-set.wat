(on request_headers
  (call $say @set@ (call $set_property @mine@ @value@))
  (call $show @get@ (call $get_property @mine@ OUT))
  (call $show @filter state@ (call $get_property @filter_state\00wasm.mine@ OUT))
  (call $say @built in@ (call $set_property @plugin_name@ @other@))
  (call $show @built in@ (call $get_property @plugin_name@ OUT))
  #0)
