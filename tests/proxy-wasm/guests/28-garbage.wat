(on request_headers
  (call $say @truncated@ (call $set_header_map_pairs #0 @\01\00\00\00\03\00\00\00\03\00\00\00x-a\00@))
  (call $say @left over@ (call $set_header_map_pairs #0 @\01\00\00\00\01\00\00\00\01\00\00\00a\00b\00more@))
  (call $say @huge count@ (call $set_header_map_pairs #0 @\ff\ff\ff\7f@))
  #0)
